"""ELMo's run of `tests/training`, on eight devices: its states are divided by rows."""

import borrowed

elmo_run = borrowed.module("training/test_elmo_run.py")
config = elmo_run.config


def test_a_run_learns_and_resumes(config, tmp_path):
    elmo_run.test_a_run_learns_and_resumes(config, tmp_path)
