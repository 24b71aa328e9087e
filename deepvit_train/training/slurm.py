"""Ask SLURM to queue this job again, for a run that was stopped before its end."""

from __future__ import annotations

import os
import re
import subprocess


def requeue() -> str:
    """Run `scontrol requeue` for the job that this process belongs to. Returns a line on how it went."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # Passed as one argument, never through a shell; still, nothing but a job's number is passed at all.
    if not re.fullmatch(r"[0-9]{1,12}", job):
        return f"not requeued: SLURM_JOB_ID={job!r} is not the number of a job"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "not requeued: scontrol is not on PATH"
    except subprocess.CalledProcessError as error:
        return f"not requeued: scontrol said {error.stderr.strip() or error.returncode}"
    except subprocess.TimeoutExpired:
        return "not requeued: scontrol did not answer in 60 s"
    return f"requeued as job {job}"
