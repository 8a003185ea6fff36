#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image (Ubuntu, as root).
set -euo pipefail
apt-get update
apt-get install -y python3 python3-venv bubblewrap
python3 -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 is needed: choose the base image Ubuntu 24.04')"
python3 -m venv /opt/grader
export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
/opt/grader/bin/python -m pip install --no-cache-dir --requirement /autograder/source/clean/requirements.txt
