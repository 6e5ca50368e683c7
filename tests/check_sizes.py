"""Part of lint: files stay small, and no name explains nothing."""

import pathlib
import sys

LONGEST = 700
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper"}

problems = []
for folder in ("llm_jax", "experiments", "tests"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        lines = len(path.read_text().splitlines())
        if lines > LONGEST:
            problems.append(f"{path}: {lines} lines, more than {LONGEST}: look for the seam")
        if path.stem in VAGUE:
            problems.append(f"{path}: a name that explains nothing")
print("\n".join(problems) or "file sizes are fine")
sys.exit(bool(problems))
