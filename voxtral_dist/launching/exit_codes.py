"""What schedulers do when the ranks of a node end with an exit code; docs/exit_codes.md says what each one means."""

SAVED = (75,)
"""Start again without counting: the run has saved, or changes its way at the next start."""

WOULD_FAIL_AGAIN = (2, 3)
"""End the run at once: the same mistake would come again."""

MAY_PASS = (1, 74, 76, 77)
"""Start again, but not forever: unexpected errors, full disks, lost peers, hangs. So is any other code."""
