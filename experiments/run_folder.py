"""The folder of a run, for train.py: where a run begins in it, what a stopped one has left, what may be removed, and
files that are whole or not there.  What a checkpoint holds is decided in train.save_checkpoint."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl")
# May differ between a run and its continuation: where and how fast it runs, what it writes.  A run with any other flag
# changed would be a mixture of two, and no seed could give it again.  More iterations stretch the cosine of the rate.
FREE_ON_RESUME = set(
    "iterations device distributed cpu_offload output_dir eval_every checkpoint_every keep_checkpoints samples resume overwrite "
    "micro_batch model rollout_batch wandb tensorboard".split()
)

# ==================================================================================================== a run


def checkpoints(folder):
    """Checkpoint folders, oldest first.  A folder has this name only from when everything is in it until it goes."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(name.rpartition("_")[2]), name) for name in names if re.fullmatch(r"checkpoint_iter_\d+", name)]
    return [os.path.join(folder, name) for _, name in sorted(found)]


def find_start(config):
    """Where the run begins: (checkpoint folder or "", its trainer state with the checkpoints that are there).  Changes
    nothing.  A damaged checkpoint is passed over for the one before it, and that is said.  Raises ValueError if the
    output folder cannot be used, or no checkpoint is whole, or its run had other flags."""
    folder, found, resume = os.path.abspath(config.output_dir), checkpoints(config.output_dir), config.resume
    if os.path.isfile(folder):
        raise ValueError(f"--output-dir {folder}: this is a file, give a folder")
    held = found + [name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))]
    if "config.json" in held:
        with open(os.path.join(folder, "config.json")) as file:
            if '"output_dir"' not in file.read():  # a model's: nobody wants it cleared for a run
                raise ValueError(f"--output-dir {folder}: its config.json is not a run's, so the folder is left alone")
    for path in (config.model, config.train_file, config.eval_file):
        if config.overwrite and path and os.path.abspath(path).startswith(folder + os.sep):
            raise ValueError(f"--overwrite would remove {path}, which this run needs: give another --output-dir")
    own = resume == "auto" or resume and os.path.dirname(os.path.abspath(resume)) == folder
    if held and not (own or config.overwrite):
        raise ValueError(f"--output-dir {folder} holds another run: add --resume auto, --overwrite or another --output-dir")
    candidates = found[::-1] if resume == "auto" else [resume] if resume else []
    for source, older in zip(candidates, candidates[1:] + [None]):
        try:
            state = read_state(source)
        except ValueError as error:
            if older is None:
                raise
            print(f"train.py: {error}; going back to {older}", file=sys.stderr)
            continue
        for name, given in dataclasses.asdict(config).items():
            free = name in FREE_ON_RESUME and not (name == "model" and config.loss == "apo")  # apo's pi_ref is the base
            if not free and given != (x := state["config"].get(name)):
                raise ValueError(f"--{name.replace('_', '-')} {given} differs from the {x} that {source} was trained with")
        return source, state | {"found": found}
    return "", {"iteration": 0, "model_tokens": 0, "seconds": 0.0, "found": found}


def open_output(config, source, iteration, found):
    """Make the output folder ready to go on from `source`, after `iteration`: a new run starts empty, a resumed one is
    cut back.  found: the checkpoints that find_start saw.  Returns the lock that keeps other runs out, a file handle;
    the system drops it however this process ends."""
    folder = config.output_dir
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another run is writing there" if isinstance(error, BlockingIOError) else error.strerror
        raise ValueError(f"--output-dir {folder}: {why}; give another folder") from None
    if checkpoints(folder) != found:  # asked again: loading the model took its time
        raise ValueError(f"--output-dir {folder}: another run has just written there: start again")
    for path in (os.path.join(folder, name) for name in RUN_FILES[1:]):
        kept = []  # lines after the checkpoint will be written again; one cut short by a kill is dropped
        if source and os.path.exists(path):
            try:
                with open(path) as file:
                    kept = [line for line in file if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged: a line of it is not a JSON object with an iteration") from None
        write(path, "".join(kept))
    prune(config, iteration)
    write(os.path.join(folder, "config.json"), json.dumps(dataclasses.asdict(config), indent=1))
    return lock


def prune(config, iteration):
    """Remove the checkpoints after `iteration`, which are of a run that went further and would be taken for this one's,
    and all but the newest of the others.  A checkpoint loses its name first, so that a kill leaves no half of one."""
    found = checkpoints(config.output_dir)
    kept = [path for path in found if int(path.rpartition("_")[2]) <= iteration][-config.keep_checkpoints :]
    for path in (path for path in found if path not in kept):
        os.rename(path, os.path.join(config.output_dir, "." + os.path.basename(path)))
    for name in os.listdir(config.output_dir):  # and what a killed run was just writing or removing
        if name.startswith(".checkpoint_iter_"):
            shutil.rmtree(os.path.join(config.output_dir, name))


# ============================================================================================== a checkpoint


def seal(aside, final, state):
    """Turn a folder that was written aside into the checkpoint `final`: trainer_state.json, with size and checksum of
    every file beside it, all of it on the disk, then the name.  Whoever sees the name sees a whole checkpoint."""
    paths = {name: os.path.join(aside, name) for name in sorted(os.listdir(aside))}
    state = state | {"files": {name: fingerprint(path) for name, path in paths.items()}}
    write(os.path.join(aside, "trainer_state.json"), json.dumps(state, indent=1))
    for path in (*paths.values(), aside):
        sync(path)
    os.rename(aside, final)
    sync(os.path.dirname(final) or ".")


def read_state(folder):
    """trainer_state.json of a checkpoint, after checking that every file it names is there and whole.  Raises
    ValueError that names the first file which is not."""
    name = "trainer_state.json"
    try:
        with open(os.path.join(folder, name)) as file:
            state = json.load(file)
        dict(state["config"]), state["iteration"] + state["model_tokens"] + state["seconds"]  # an error if one is missing
        for name, written in state["files"].items():
            if fingerprint(os.path.join(folder, name)) != written:
                raise ValueError("its size or checksum is not the one written")
    except OSError as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: {name} is damaged ({type(error).__name__}: {error})") from None
    return state


# ===================================================================================================== files


def write(path, text):
    """A whole file or none: written aside, synced, renamed."""
    aside = path + ".tmp"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):  # a full disk, or Ctrl-C
            os.remove(aside)


def sync(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def append(path, rows):
    """Lines of JSON at the end of a file, on the disk when this returns."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    sync(path)


def fingerprint(path):
    """Size and checksum of a file, for the manifest."""
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
