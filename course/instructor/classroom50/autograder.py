"""The autograder for Classroom 50: public tests only, because students can download its bundle.

The runner starts it in the student's checkout and reads result.json there (the contract is in
"Advanced Autograding" of Classroom 50's wiki). docs/teaching.md says how to install it.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEELS = "https://download.pytorch.org/whl/cpu"


def install():
    """The pinned packages, in the build of torch without CUDA."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--extra-index-url", WHEELS]
    requirements = HERE / "clean" / "requirements.txt"
    subprocess.run([*command, "--requirement", str(requirements)], check=True)


def tests_of(report: dict):
    """The report's tests as the contract wants them."""
    tests = []
    for one in report["tests"]:
        if one["status"] != "blocked":
            tests.append(
                {
                    "test-name": f"{one['exercise']}: {one['claim']}",
                    "passed": one["status"] == "passed",
                    "score": one["points"],
                    "max-score": one["worth"],
                    "message": one["message"],
                }
            )
    return tests


def result_of(report: dict, environment):
    now = datetime.datetime.now(datetime.timezone.utc)
    tests = tests_of(report)
    return {
        "schema": "classroom50/result/v1",
        "classroom": environment["CLASSROOM"],
        "assignment": environment["ASSIGNMENT"],
        "submission": environment["SUBMISSION_TAG"],
        "commit": environment["COMMIT_URL"],
        "release": environment["RELEASE_URL"],
        "review": environment.get("REVIEW_URL") or environment["COMMIT_URL"],
        "datetime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "score": sum(one["score"] for one in tests),
        "max-score": sum(one["max-score"] for one in tests),
        "tests": tests,
    }


def main(flags):
    """`--installed`: the packages are there. Other flags go to grade_all.py."""
    if "--installed" in flags:
        flags.remove("--installed")
    else:
        install()
    with tempfile.TemporaryDirectory() as out:
        # The machine is the student's own for this one job, and nothing here is secret.
        grader = [sys.executable, str(HERE / "grade_all.py"), ".", "--public", "--unsandboxed"]
        command = [*grader, "--out", out, *flags]
        subprocess.run(command, check=True)
        (report,) = json.loads(Path(out, "report.json").read_text()).values()
    Path("result.json").write_text(json.dumps(result_of(report, os.environ), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
