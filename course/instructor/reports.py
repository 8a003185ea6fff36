"""What grade_all.py writes: JSON, CSV, the class's table, a page for every student, Gradescope.

A report is {"sha256": exercise -> hash of the files that it was graded on, "notes": exercise ->
list, "tests"}. Every test of it is a dict: exercise, kind (public or hidden), test, claim, status,
message, points, worth, seconds. The grades are computed from it.
"""

import csv
import fcntl
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

READ_IT = "read it"  # notes that end so are for the instructor alone
LONGEST_NAME = 200  # bytes of a file's name

# ---- grades -----------------------------------------------------------------------------------


def totals(tests):
    return {
        "points": sum(one["points"] for one in tests),
        "max": sum(one["worth"] for one in tests if one["status"] != "blocked"),
        "blocked": sum(one["worth"] for one in tests if one["status"] == "blocked"),
    }


def grades_of(report: dict):
    tests = report["tests"]
    slugs = sorted({one["exercise"] for one in tests})
    by_slug = {slug: totals([one for one in tests if one["exercise"] == slug]) for slug in slugs}
    return totals(tests) | {"exercises": by_slug}


def merged(old: dict | None, new: dict):
    """A student's report: what `new` graded, and what only `old` did."""
    if old is None:
        return new
    graded = {(one["exercise"], one["kind"]) for one in new["tests"]}
    kept = [one for one in old["tests"] if (one["exercise"], one["kind"]) not in graded]
    tests = sorted(kept + new["tests"], key=lambda one: (one["exercise"], one["kind"] == "hidden"))
    notes = old["notes"] | new["notes"]
    for slug in {one["exercise"] for one in kept} & new["sha256"].keys():
        if old["sha256"].get(slug) != new["sha256"][slug]:
            note = f"{slug}: some of its tests ran on other files: grade it again"
            notes[slug] = [*notes[slug], note]
    return {"sha256": old["sha256"] | new["sha256"], "notes": notes, "tests": tests}


def notes_of(report: dict, for_student: bool = False):
    """All notes, each once. Students do not get those that ask the instructor to read."""
    notes = dict.fromkeys(note for notes in report["notes"].values() for note in notes)
    return [note for note in notes if not (for_student and note.endswith(READ_IT))]


# ---- files ------------------------------------------------------------------------------------


def write(path: Path, text: str):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    draft.replace(path)


def write_json(path: Path, value):
    write(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def alone_in(directory: Path):
    """No other grader writes into the directory meanwhile."""
    place = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def read_reports(out: Path):
    """name -> report, as an earlier call left them. Raises ValueError if they are damaged."""
    path = out / "report.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError
    for report in found.values():
        if not isinstance(report, dict) or {*report} != {"sha256", "notes", "tests"}:
            raise ValueError
        grades_of(report)
    return found


def add(out: Path, name: str, report: dict):
    """Put a student's report beside the others in `out`, and write all files anew."""
    with alone_in(out):
        reports = read_reports(out)
        reports[name] = merged(reports.get(name), report)
        grades = {name: grades_of(one) for name, one in reports.items()}
        write_json(out / "report.json", reports)
        write_json(out / "grades.json", grades)
        write(out / "grades.csv", csv_text(grades))
        write(out / "feedback" / f"{short(name)}.txt", feedback(name, reports[name]))


def short(name: str):
    return name.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore")


def csv_text(grades: dict):
    slugs = all_slugs(grades)
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["submission", "points", "max", "blocked", *slugs])
    for name, one in grades.items():
        points = [one["exercises"].get(slug, {}).get("points", "") for slug in slugs]
        label = "'" * name.startswith(("=", "+", "-", "@")) + name  # else a formula
        lines.writerow([label, one["points"], one["max"], one["blocked"], *points])
    return file.getvalue()


def all_slugs(grades: dict):
    return sorted({slug for one in grades.values() for slug in one["exercises"]})


def in_words(grade: dict):
    text = f"{grade['points']:g} of {grade['max']:g} points"
    return text + f" ({grade['blocked']:g} blocked: no GPU)" * bool(grade["blocked"])


def class_table(grades: dict, notes: dict):
    """One line for each submission. A star: `notes` (name -> list) has one about it."""
    slugs = all_slugs(grades)
    width = max([len("submission"), *(len(name) + 2 for name in grades)])
    lines = ["  ".join(["submission".ljust(width), *(slug[:2] for slug in slugs)])]
    for name, one in grades.items():
        points = [one["exercises"].get(slug, {}).get("points") for slug in slugs]
        cells = [" -" if value is None else f"{value:2g}" for value in points]
        label = name + " *" * bool(notes.get(name))
        lines.append("  ".join([label.ljust(width), *cells, in_words(one)]))
    return "\n".join(lines)


def feedback(name: str, report: dict):
    """The page for one student: every claim, and why it failed."""
    grades = grades_of(report)
    lines = [f"{name}: {in_words(grades)}", *notes_of(report, for_student=True)]
    for slug, grade in grades["exercises"].items():
        lines += ["", f"exercise {slug}: {in_words(grade)}"]
        for one in report["tests"]:
            if one["exercise"] == slug:
                worth = f"({one['worth']:g}, {one['kind']})"
                lines.append(f"  {one['status']:8s}{worth:12s}{one['claim']}")
                if one["message"]:
                    lines.append(f"{'':22s}why: {one['message']}")
    return "\n".join(lines) + "\n"


def gradescope(report: dict):
    """results.json, as gradescope-autograders.readthedocs.io specifies it."""
    tests = []
    for number, one in enumerate(report["tests"], 1):
        is_blocked = one["status"] == "blocked"
        tests.append(
            {
                "number": str(number),
                "name": f"{one['exercise']} ({one['kind']}): {one['claim']}",
                "score": one["points"],
                "max_score": 0 if is_blocked else one["worth"],
                "status": "passed" if one["status"] == "passed" else "failed",
                "output": one["message"] or one["status"],
                "visibility": "visible" if one["kind"] == "public" else "after_published",
            }
        )
        if is_blocked:
            del tests[-1]["status"]  # neither
    notes = "\n".join(notes_of(report, for_student=True))
    return {"output": notes, "stdout_visibility": "hidden", "tests": tests}
