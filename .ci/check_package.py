"""Build wheel and sdist as a release would, and use the wheel as somebody who installed it: in environments of its own.

Run by `make check-package`, outside of the checkout, so that nothing is found that was not installed. The base
environment must plan without torch and refuse to train by name of what is missing; the one with ``[train]`` must train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = (".html", ".js", ".typed")
EVERY_MODULE = """
import importlib, pkgutil, sys, hbp
names = [m.name for m in pkgutil.walk_packages(hbp.__path__, "hbp.") if not m.name.endswith("__main__")]
missing = set()
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing.add(error.name.split(".")[0])
assert missing <= set(sys.argv[1:]), f"not declared: {missing}"
print(len(names), "modules")
"""
LENGTHS = """
import numpy as np
rng = np.random.default_rng(0)
np.save("lengths.npy", np.clip(rng.lognormal(6, 1.2, 3000), 16, 32768).astype(np.int64))
"""
TINY = ("data.short_samples=40", "data.long_samples=1", "data.eval_samples=4", "data.longest_chars=4000")
TINY_RUN = ("cluster.processes=1", "cluster.profile=false", "plan.baseline=null", "plan.global_batch_tokens=8192")


def run(words: Sequence[str | Path], folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command outside of the checkout; end with what it printed unless its exit code is `code`."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run([str(w) for w in words], cwd=folder, env=own, capture_output=True, text=True, check=False)
    if done.returncode != code:
        command = " ".join(map(str, words))
        sys.exit(f"{command}\nexit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
    return done


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is made from the sdist, as an installer without wheels would."""
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Every file of the package is in both, and the wheel holds nothing else."""
    wanted = {
        str(file.relative_to(ROOT / "src"))
        for file in (ROOT / "src" / "hbp").rglob("*")
        if file.suffix in (".py", *NOT_CODE)
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != wanted:
        sys.exit(f"{wheel.name}: missing {sorted(wanted - found)}, not ours {sorted(found - wanted)}")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"src/{name}" for name in wanted} | {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
    if needed - held:
        sys.exit(f"{sdist.name}: missing {sorted(needed - held)}")
    print(f"{wheel.name}: {len(found)} files", flush=True)


def environment(folder: Path, wheel: Path, extras: str, options: Sequence[str]) -> Path:
    """A clean one with the wheel in it; returns the folder of its commands."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", *options, f"{wheel}{extras}"], folder)
    run([python, "-m", "pip", "check"], folder)
    return folder / "bin"


def check_base(bin: Path, folder: Path) -> None:
    """Plans, simulates and reports without torch; what needs more says what to install."""
    version = run([bin / "hbp", "--version"], folder).stdout.split()[1]
    if f"-{version}-" not in next(folder.glob("**/*.whl"), Path(f"-{version}-")).name:
        sys.exit(f"hbp --version says {version}, the wheel's name another")
    run([bin / "python", "-c", "import hbp, sys; assert 'torch' not in sys.modules"], folder)
    run([bin / "python", "-c", LENGTHS], folder)
    words = ["--lengths", "lengths.npy", "--model", "llama-3.1-8b", "--gpus", "8", "--out", "plan", "--json"]
    plan = json.loads(run([bin / "hbp", "plan", *words], folder).stdout)
    run([bin / "hbp", "simulate", "plan", "--json"], folder)
    run([bin / "hbp", "report", "plan", "--out", "page.html"], folder)
    page = (folder / "page.html").read_text()
    if "<script" not in page or "</html>" not in page:
        sys.exit("hbp report wrote a page without its script")
    refused = run([bin / "hbp", "train", ROOT / "examples" / "quickstart.yaml"], folder, code=2).stderr
    if "[train]" not in refused:
        sys.exit(f"hbp train without torch does not say what to install: {refused}")
    allowed = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "accelerate", "peft", "trl", "ray")
    modules = run([bin / "python", "-c", EVERY_MODULE, *allowed], folder).stdout.strip()
    print(f"base: hbp {version}, {modules}, a plan of {len(plan['groups'])} groups", flush=True)


def check_train(bin: Path, folder: Path) -> None:
    """A tiny run on one process, from its samples to the exported model."""
    overrides = [f"model.path={ROOT / 'examples' / 'quickstart-model'}", f"run_dir={folder / 'run'}", *TINY, *TINY_RUN]
    run([bin / "hbp", "train", ROOT / "examples" / "quickstart.yaml", *overrides], folder)
    if not list((folder / "run").rglob("model.safetensors")):
        sys.exit("hbp train exported no model")
    modules = run([bin / "python", "-c", EVERY_MODULE, "accelerate", "peft", "trl", "ray"], folder).stdout.strip()
    print(f"[train]: {modules}, a tiny run", flush=True)


def main() -> None:
    """Build, then check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="also install [train] and train (a minute and 1 GB more)")
    parser.add_argument("--everything", action="store_true", help="also install [all]")
    parser.add_argument("--keep", type=Path, help="folder to keep wheel and sdist in")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist = args.keep.absolute() if args.keep else folder / "dist"
        dist.mkdir(parents=True, exist_ok=True)
        if old := [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]:
            sys.exit(f"{dist} holds {old[0].name} already; give an empty folder")
        wheel, sdist = build(dist)
        check_contents(wheel, sdist)
        check_base(environment(folder / "base", wheel, "", options), folder)
        pinned = ["-c", str(ROOT / "constraints-cpu.txt"), *options]
        if args.train:
            check_train(environment(folder / "train", wheel, "[train]", pinned), folder)
        if args.everything:
            bin = environment(folder / "all", wheel, "[all]", pinned)
            print("[all]:", run([bin / "python", "-c", EVERY_MODULE], folder).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
