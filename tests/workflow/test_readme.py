"""What the README shows is run."""

import re
import subprocess
import sys

import small

README = (small.ROOT / "README.md").read_text()


def test_the_notebook_example_runs(finished):
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    code = code.replace("toy-olmoe", "small-moe") + "print(heads_lpi.shape, len(prompts))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=finished,
        env={"PYTHONPATH": "scripts"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "torch.Size([405, 4]) 405\n"


def test_named_files_and_commands_exist():
    for path in re.findall(r"`((?:config|workflow|scripts|tests|envs)/[\w./-]*)`", README):
        assert (small.ROOT / path).exists(), path
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in (small.ROOT / "Makefile").read_text(), target
    picture = re.search(r"!\[.*\]\((.*)\)", README).group(1)
    assert (small.ROOT / picture).read_text().startswith("<?xml")
