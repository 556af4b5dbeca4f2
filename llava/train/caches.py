"""What never changes during a run, computed once before the first step and kept on disk.

``--reference cache``: the reference's log-probabilities of every pair. ``--feature_cache``: the frozen tower's features
of every picture. (``--cache_hidden`` has a file of its own, ``hidden_cache``.) Each is shared out over the ranks, and a
run that is killed while filling one goes on there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback

from llava import interruption
from llava.data.images import picture_hash
from llava.errors import BrokenImage, UserError, warn
from llava.files import publish
from llava.model.checkpoint import content_hash, has_tower, weight_files
from llava.train.guards import deaf_worker
from llava.train.reference import FirstPolicy, Reference
from llava.train.reference_cache import ReferenceCache, record_keys

PICTURES_AT_A_TIME = 8


class Filled(NamedTuple):
    """What filling a cache came to: records (of features: pictures) that all ranks computed, and that were there."""

    cache: str  # "reference" | "hidden" | "features"
    computed: int
    found: int


class FillCaches(TrainerCallback):
    """Fills at the beginning of the training, when the model is wrapped and where it belongs.

    What came of it, and its seconds, stand in ``took`` by the cache's name.
    """

    def __init__(self, *fillers: Callable[[], Filled]) -> None:
        self.fillers = fillers
        self.took: dict[str, dict[str, float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The data's order and dropout draw from these generators; a filled cache must not change what they give.
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # Each once: one that stayed would hold the trainer in a circle, and its data workers beyond their time.
            fillers, self.fillers = self.fillers, ()
            for fill in fillers:
                began = time.monotonic()
                name, computed, found = fill()
                seconds = round(time.monotonic() - began, 3)
                self.took[name] = {"computed": computed, "found": found, "seconds": seconds}


def cache_times(trainer: Any) -> dict[str, dict[str, float]]:
    """``{"hidden": {"computed": 24, "found": 0, "seconds": 4.1}, ...}``: empty, until the training has filled them."""
    took: dict[str, dict[str, float]] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, FillCaches):
            callback.took = took
    return took


def fill_reference(trainer: Any, cache: ReferenceCache, reference: Reference) -> Filled:
    """Compute what ``cache`` does not hold yet and hand every data set its pairs' values.

    Raises:
        UserError: the policy has been trained already, and the reference was the policy at its start.
    """
    cache.values = rank_0s(cache.values)  # another run may have added lines while the ranks were reading
    computed = found = 0
    for dataset in [d for d in (trainer.train_dataset, trainer.eval_dataset) if d is not None]:
        keys = record_keys(dataset.outline(index) for index in range(len(dataset)))
        missing = {key: index for index, key in enumerate(keys) if key not in cache.values}
        too_late = isinstance(reference, FirstPolicy) and trainer.state.global_step > 0
        if too_late and dataset.skip_missing_images:  # what could not be opened then is not missed now
            pictures = dataset.picture_paths
            missing = {key: index for key, index in missing.items() if _opens(dataset, pictures[index])}
        if missing and too_late:
            raise UserError(
                f"{cache.path}: {len(missing)} of {len(keys)} pairs are missing, and the policy that would give them "
                "has been trained since; pass the file the run was started with, or --resume_from_checkpoint False"
            )
        computed, found = computed + len(missing), found + len(set(keys)) - len(missing)
        if missing:
            _compute_logps(trainer, cache, reference, dataset, keys, list(missing.values()))
        unknown = (float("nan"), float("nan"))  # of a picture that cannot be opened: no batch will ask for it
        values = torch.tensor([cache.values.get(key, unknown) for key in keys])
        dataset.remember_reference(values.share_memory_())
    return Filled("reference", computed, found)


def _compute_logps(
    trainer: Any, cache: ReferenceCache, reference: Reference, dataset: Any, keys: list[str], missing: list[int]
) -> None:
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    if accelerator.is_main_process:
        cache.open()
    accelerator.wait_for_everyone()
    pictures = dataset.picture_paths
    missing.sort(key=pictures.__getitem__)  # pairs about one picture share its row
    for numbers, inputs in each_batch(trainer, dataset, missing, "reference"):
        with trainer.compute_loss_context_manager(), reference.forward_of(model) as reference_model:
            scores = reference_model(**inputs, score_labels=True, use_cache=False).scores
        chosen, rejected = scores.row_sums(scores.logps).chunk(2)
        found = zip([keys[number] for number in numbers], chosen.tolist(), rejected.tolist(), strict=True)
        cache.add(gather_object(list(found)), write=accelerator.is_main_process)


class Numbered:
    """A collator that also says which records a batch is of: a broken picture's place is taken by another's."""

    def __init__(self, collator: Callable) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> tuple[list[int], dict[str, Any]]:
        return [example.number for example in examples], self.collator(examples)


def each_batch(
    trainer: Any, dataset: Any, indices: Sequence[int], title: str
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """This rank's batches of ``indices``, as many as every rank has: numbers of the records, arguments of ``forward``.

    The model is in evaluation mode meanwhile.
    """
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model_wrapped
    loader = DataLoader(
        dataset.alone(),
        batch_sampler=_shared_out(indices, args.per_device_train_batch_size, accelerator),
        collate_fn=Numbered(trainer.data_collator),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=functools.partial(deaf_worker, None),
    )
    training = model.training
    model.eval()
    quiet = not accelerator.is_main_process
    for numbers, batch in tqdm(loader, desc=title, unit="batch", disable=quiet, mininterval=5):
        inputs = trainer._prepare_inputs(batch)
        inputs.pop("records", None)
        yield numbers, inputs
        interruption.stop_if_requested("what was computed is kept")
    model.train(training)


def _shared_out(indices: Sequence[int], size: int, accelerator: Any) -> list[list[int]]:
    """This rank's batches; all ranks get the same number (the last is repeated), since ZeRO-3 runs them in step."""
    batches = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    batches += batches[-1:] * (-len(batches) % accelerator.num_processes)
    return batches[accelerator.process_index :: accelerator.num_processes]


def feature_folder(root: str | None, plan: Any, parts: set[str]) -> Path | None:
    """Where features of this tower, of pictures prepared like this, belong; the tower's weights by content.

    Raises:
        UserError: the tower trains.
    """
    if root is None:
        return None
    if "vision_tower" in parts:
        raise UserError("--feature_cache keeps what a frozen tower sees, but the vision tower trains; leave it out")
    files = weight_files(plan.folder if has_tower(plan.folder) else plan.tower)
    files += [file for stage in plan.chain.stages[1:] if "vision_tower" in stage.parts() for file in stage.files()]
    processor = {k: v for k, v in plan.image_processor.to_dict().items() if not k.startswith("_")}
    names = ("mm_vision_config", "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio")
    key = [content_hash(files), processor, {n: plan.config.get(n) for n in names}, str(plan.dtype)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return Path(root).expanduser() / digest[:16]


def datasets_of(trainer: Any) -> list[Any]:
    """All that a run takes records from."""
    train = trainer.train_dataset
    return [dataset for dataset in (train, trainer.eval_dataset, getattr(train, "aux", None)) if dataset is not None]


def distinct_pictures(datasets: Sequence[Any]) -> list[str]:
    """Every picture of the data sets once."""
    return list(dict.fromkeys(path for dataset in datasets for path in dataset.picture_paths))


def feature_files(folder: Path, pictures: dict[str, str]) -> dict[str, Path]:
    """Where features of pictures belong, whose SHA-256 are given."""
    return {path: folder / f"{content[:32]}.safetensors" for path, content in pictures.items()}


def see_with_tower(model: Any, pixels: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """What the tower sees: (N, T, D_vision)."""
    return model.see(pixels, levels)


def fill_features(
    trainer: Any,
    folder: Path,
    flag: str = "--feature_cache",
    see: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] = see_with_tower,
    blank: torch.Tensor | None = None,
    hashes: dict[str, str] | None = None,
) -> Filled:
    """See every picture once and let the data sets load what was seen instead of the picture.

    ``see(model, pictures, levels)`` gives the features; ``blank`` as ``ImageLoader.use_features`` takes it; ``hashes``
    are the pictures' SHA-256 where they are known.
    """
    accelerator = trainer.accelerator
    datasets = datasets_of(trainer)
    files: dict[str, Path] = {}
    if accelerator.is_main_process:
        files = feature_files(folder, hashes or {path: picture_hash(path) for path in distinct_pictures(datasets)})
    files = rank_0s(files)
    missing = rank_0s([path for path, file in files.items() if not file.exists()])  # before anyone writes
    loader = datasets[0].builder.load_image
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
        model = accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        batches = _shared_out(missing, PICTURES_AT_A_TIME, accelerator)
        quiet, skips = not accelerator.is_main_process, datasets[0].skip_missing_images
        for batch in tqdm(batches, desc="features", unit="batch", disable=quiet, mininterval=5):
            _see(functools.partial(see, model), loader, batch, files, skips, accelerator.device, flag)
            interruption.stop_if_requested("what was computed is kept")
        accelerator.wait_for_everyone()
    loader.use_features(rank_0s({path: str(file) for path, file in files.items() if file.exists()}), flag, blank)
    return Filled("features", len(missing), len(files) - len(missing))


def rank_0s(value: Any) -> Any:
    """Rank 0's value: what decides how many forwards there are must be the same everywhere."""
    held = [value]
    broadcast_object_list(held)
    return held[0]


def _opens(dataset: Any, path: str) -> bool:
    try:
        dataset.builder.load_image(path, "")
    except BrokenImage:
        return False
    return True


def _see(
    see: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loader: Any,
    paths: list[str],
    files: dict[str, Path],
    skip_broken: bool,
    device: torch.device,
    flag: str,
) -> None:
    pictures = {}
    for path in paths:
        try:
            pictures[path] = loader(path, flag)
        except BrokenImage as error:
            if not skip_broken:
                raise
            warn(str(error), everywhere=False)
    # A rank without a picture still runs the tower: under ZeRO-3 the others wait for it.
    pixels = torch.stack(list(pictures.values()) or [loader.blank()]).to(device)
    with torch.no_grad():
        seen = see(pixels, loader.levels().to(device)).cpu()
    for path, features in zip(pictures, seen, strict=False):
        temporary = files[path].with_name(f".{files[path].name}.{os.getpid()}")
        try:
            save_file({"features": features.contiguous()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # a name is given to what is on the disk
            publish(temporary, files[path])
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{flag}: {files[path]}: cannot be written ({error})", everywhere=False) from None
