"""Runs without a scheduler: a file of hosts, and a script for one machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from voxtral_dist.errors import UserError
from voxtral_dist.launching.exit_codes import SAVED, WOULD_FAIL_AGAIN


def run_arguments(config: str, overrides: Sequence[str]) -> str:
    """The arguments of a run, quoted for a shell."""
    return shlex.join(["--config", config, *(word for one in overrides for word in ("--set", one))])


def hostfile(hosts: Sequence[str], gpus: int, config: str, overrides: Sequence[str]) -> str:
    """A file for `deepspeed --hostfile`.

    Raises:
        UserError: a host is named twice, or by more than a name.
    """
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", host):
            raise UserError(f"`--hosts` must be names or addresses of hosts, but one is {host!r} instead.")
    if len(set(hosts)) < len(hosts):
        raise UserError("`--hosts` must name each host once, but one is there twice: the ranks of a host are --gpus.")
    lines = [
        "# All hosts have the same files, and the first one reaches the others by ssh without a password. There, run:",
        f"#   deepspeed --hostfile FILE launch/train.py {run_arguments(config, overrides)}",
        *(f"{host} slots={gpus}" for host in hosts),
    ]
    return "\n".join(lines) + "\n"


def local_script(gpus: int, folder: str, config: str, overrides: Sequence[str], max_restarts: int) -> str:
    """A script that starts a run, and starts it again after codes on which it resumes.

    SIGTERM and Ctrl-C end it with the run, which saves.
    """
    return (
        _LOCAL.replace("@FOLDER@", shlex.quote(folder))
        .replace("@GPUS@", str(gpus))
        .replace("@ARGUMENTS@", run_arguments(config, overrides))
        .replace("@MAX_RESTARTS@", str(max_restarts))
        .replace("@SAVED@", " | ".join(map(str, SAVED)))
        .replace("@AGAIN@", " | ".join(map(str, WOULD_FAIL_AGAIN)))
    )


_LOCAL = """#!/bin/bash
# Written by `voxtral-dist launch local`; rerun that command to change it. On Ctrl-C or SIGTERM the run saves and ends.
set -uo pipefail
cd @FOLDER@ || exit 2
export NUM_NODES=1 PROCS_PER_NODE=@GPUS@
ranks="" stopped=0 interrupted=0 failures=0
# shellcheck disable=SC2317,SC2329 # traps call it
stop() {
    stopped=1 interrupted=1
    [[ -z $ranks ]] || kill -TERM "$ranks" 2>/dev/null || true
}
trap stop TERM INT
while true; do
    docker/entrypoint @ARGUMENTS@ &
    ranks=$!
    # A signal interrupts `wait`: wait again until the ranks have ended. 127: they had ended when it came.
    wait "$ranks"
    code=$?
    while ((interrupted)); do
        interrupted=0
        wait "$ranks" 2>/dev/null
        again=$?
        ((again == 127)) || code=$again
    done
    ((!stopped)) || exit "$code"
    case $code in
        0 | @AGAIN@) exit "$code" ;;
        @SAVED@) continue ;;
    esac
    failures=$((failures + 1))
    ((failures <= @MAX_RESTARTS@)) || exit "$code"
    sleep 10
done
"""
