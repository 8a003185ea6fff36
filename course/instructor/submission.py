"""What a student hands in: a directory or a zip file. The files that count go into a clean tree."""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from reports import READ_IT

CLEAN = Path(__file__).resolve().parent / "clean"  # what the students were given
LARGEST = 2**20  # bytes of a file that a student may hand in
# Names that no exercise needs, and that code against the grader may.
UNUSUAL = set(
    "sys gc inspect ctypes ctypeslib socket subprocess mmap pickle builtins importlib exec "
    "globals vars getattr currentframe _getframe tb_frame f_back f_globals f_locals __code__ "
    "__dict__ __import__ __subclasses__ __array_interface__ from_dlpack probes claims grading "
    "TorchFunctionMode TorchDispatchMode DisableTorchFunction DisableTorchFunctionSubclass".split()
)


def name_of(path: Path):
    """Of the student."""
    return printable(path.stem if path.is_file() else Path(os.path.abspath(path)).name)


def printable(text: str):
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_file(path: Path):
    """The bytes of a file that was handed in, or None and why it does not count."""
    try:
        status = path.lstat()
    except OSError:
        return None, "is missing"
    if not stat.S_ISREG(status.st_mode):
        return None, "is no regular file"
    if status.st_size > LARGEST:
        return None, f"has more than {LARGEST:,} bytes"
    try:
        return path.read_bytes(), None
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def root_of(names, files):
    """Which directory of a submission has the files: "", or the only one in it that has some."""
    roots = {name[: -len(file)] for name in names for file in files if name.endswith("/" + file)}
    inside = [root for root in sorted(roots) if root.count("/") == 1 and root != "../"]
    return "" if len(inside) != 1 or set(names) & set(files) else inside[0]


def unpack(archive: zipfile.ZipFile, place: Path, files):
    """Take the files out of a zip file, and no others.

    Returns (the directory they were in, notes about those that cannot be read).
    """
    # Windows may write a\\b for a/b.
    members = {info.filename.replace("\\", "/"): info for info in archive.infolist()}
    root, notes = root_of(members, files), []
    for file in files:
        if root + file in members:
            try:
                with archive.open(members[root + file]) as member:
                    data = member.read(LARGEST + 1)  # one more: read_file says why
            except Exception as error:  # encrypted, damaged, compressed in an unknown way
                notes.append(f"{file} cannot be read: {error}")
                continue
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(data)
    return root, notes


def names_in(directory: Path, files):
    """Those of the files that the directory has, and those that a directory in it has. No links."""
    inside = [one for one in directory.iterdir() if one.is_dir() and not one.is_symlink()]
    places = [directory, *inside]
    found = [place / file for place in places for file in files]
    return [str(one.relative_to(directory)) for one in found if os.path.lexists(one)]


@contextmanager
def opened(path: Path, files):
    """(directory with the submission's files, notes)."""
    with tempfile.TemporaryDirectory() as directory:
        place, root, notes = Path(directory), "", []
        try:
            if path.is_file():
                with zipfile.ZipFile(path) as archive:
                    root, notes = unpack(archive, place, files)
            else:
                root = root_of(names_in(path, files), files)
                place = path / root
        except Exception as error:
            notes = [f"it cannot be read: {error}"]
        if root:
            notes.append(f"the files are taken from {root}")
        yield place, [printable(note) for note in notes]


def clean_tree(submission: Path, tree: Path, files):
    """A tree with these files of the submission. Returns (file -> its bytes, file -> notes).

    It has neither the tests nor the scores of the frozen rollouts: they would give answers away.
    """
    from safetensors.torch import load_file, save_file

    left_out = shutil.ignore_patterns("__pycache__", "test_*.py")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(CLEAN, tree, ignore=left_out)
    rollouts = load_file(tree / "tests" / "rollouts.safetensors")
    rollouts["teacher_logp"].zero_()
    save_file(rollouts, tree / "tests" / "rollouts.safetensors")
    found, notes = {}, {}
    for name in files:
        data, why = read_file(submission / name)
        if data is not None and not is_inside(submission / name, submission):
            data, why = None, "lies outside of the submission"
        if data is None:
            notes[name] = [f"{name} {why}: graded as not written"]
            continue
        found[name] = data
        notes[name] = notes_about(name, data)
        (tree / name).write_bytes(data)
    if not any(os.path.lexists(submission / name) for name in files):
        notes = dict.fromkeys(files, ["none of the files is there: graded as not written"])
    return found, notes


def is_inside(path: Path, directory: Path):
    return path.resolve().is_relative_to(directory.resolve())


def notes_about(name: str, data: bytes):
    """What an instructor should know about a file that was handed in."""
    text = unicodedata.normalize("NFKC", data.decode(errors="replace"))
    words = [Counter(re.findall(r"\w+", one)) for one in (text, (CLEAN / name).read_text())]
    unusual = sorted((words[0] - words[1]).keys() & UNUSUAL)
    notes = [f"{name} uses {', '.join(unusual)}: {READ_IT}"] if unusual else []
    try:
        compile(data, name, "exec")
    except (SyntaxError, ValueError) as error:
        notes.append(printable(f"{name} is no Python, so all of its exercises fail: {error}"))
    return notes


def hash_of(found: dict, files):
    """Of the files of one exercise. Equal hashes are equal files."""
    digest = hashlib.sha256()
    for name in files:
        data = found.get(name, b"")
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
