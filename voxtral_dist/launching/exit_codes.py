"""What schedulers do when the ranks of a node end with an exit code; docs/exit_codes.md says what each one means.

All other codes may pass (unexpected errors, full disks, lost peers, hangs): start again, but not forever.
"""

SAVED = (75,)
"""Start again without counting: the run has saved, or changes its way at the next start."""

WOULD_FAIL_AGAIN = (2, 3)
"""End the run at once: the same mistake would come again."""
