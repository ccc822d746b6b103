"""The README says what the code does: flags, defaults, metrics, names."""

import dataclasses
import importlib
import pathlib
import re
import shutil
import subprocess
import sys

import train

ROOT = pathlib.Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_flag_is_listed_with_its_defaults():
    """Guards against a table that rots when a default changes."""
    for f in dataclasses.fields(train.Config):
        row = re.search(rf"^\| `--{f.name.replace('_', '-')}` \| (.*?) \| (.*?) \| .+ \|$", README, re.MULTILINE)
        assert row, f.name
        default = "tiny_base" if f.name == "model" else "off" if f.default is False else f.default
        assert row[1] == (f"`{default}`" if default != "" else ""), f.name
        preset = train.PRESETS["training"].get(f.name, "")
        assert row[2] == (f"`{preset}`" if preset != "" else ""), f.name


def test_every_place_it_names_exists():
    """`file.name` and `file.Class.name` in the tables lead somewhere."""
    places = re.findall(r"`(astar_search|policy|value|reward|data|fsdp|train)\.((?!py|safetensors)\w+(?:\.\w+)?)`", README)
    assert len(places) >= 5
    for module, path in places:
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    for module, name in re.findall(r"`(\w+)\.py` `(\w+(?:\.\w+)?)`", README):
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)


def test_every_file_it_names_exists():
    for name in set(re.findall(r"`((?:experiments|tests|tiny_base)/[\w./-]*)`", README)):
        assert (ROOT / name).exists(), name
    top = {path.name for path in ROOT.glob("*.py")}
    assert top == {f"{name}.py" for name in "astar_search value policy fsdp reward data train eval".split()}


def test_policy_and_fsdp_can_be_copied_alone(tmp_path):
    """Guards against an import of a sibling; the other leaves have this test beside their own."""
    for name in ("policy", "fsdp"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    code = "import sys; sys.path[:0] = ['policy', 'fsdp']; import policy, fsdp; print(fsdp.start(device='cpu').is_main)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout == "True\n", out.stderr
