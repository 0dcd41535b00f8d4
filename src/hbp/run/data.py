"""From the configuration to the samples of a run: sources, tokens, what is trained on and what is held out.

What cannot be trained on is refused here, before any process is started or anything is tokenized where that is enough:
sources that are not there, ids that the model cannot embed, samples beyond its positions, data with nothing to learn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hbp.config import Config, DataConfig, SourceConfig
from hbp.cost.cluster import GIB
from hbp.data.build import Recipe, build_store, recipe_of
from hbp.data.cache import OFF, STORES, cache_folder, is_off
from hbp.data.look import count, summary
from hbp.data.record import Reading
from hbp.data.samples import Samples, cut_to, split_samples
from hbp.data.sources import Source, check_sources
from hbp.data.stdlib_sft import train_tokenizer, write_dataset
from hbp.data.store import ALONE, TokenStore, open_store
from hbp.errors import HbpError
from hbp.progress import say


def sources_of(data: DataConfig) -> list[Source]:
    """The sources that a configuration names, those for evaluation last.

    Raises:
        HbpError: it names them twice, or one is not there.
    """
    if data.sources and "source" in data.model_fields_set:
        raise HbpError("data.source and data.sources are both given; give one")
    if not data.sources:
        sources = [Source(data.source, "data", data.split, data.subset, data.streaming)]
    else:
        sources = [_source(source, held_out=False) for source in data.sources]
    if isinstance(data.eval_source, str):
        sources.append(Source(data.eval_source, "evaluation", data.split, data.subset, data.streaming, held_out=True))
    else:
        sources += [_source(source, held_out=True) for source in data.eval_source or ()]
    check_sources(sources)
    return sources


def _source(given: SourceConfig, *, held_out: bool) -> Source:
    values = given.model_dump()
    name = values.pop("name") or Path(given.path).name.split(".")[0] or given.path
    return Source(**values, name=name, held_out=held_out)


def prepare(config: Config) -> TokenStore:
    """Make a run's token store (and for the embedded data set its files and tokenizer), or open it if it is up to date.

    Raises:
        HbpError: from finding, reading or tokenizing, or a tokenizer with ids that the model cannot embed.
    """
    data, tokenizer = config.data, config.data.tokenizer or config.model.path
    if data.source == "stdlib" and not data.sources:
        source, tokenizer = _prepare_stdlib(data, Path(config.run_dir) / "data", config.seed)
        data = data.model_copy(update={"source": source})
    sources = sources_of(data)
    recipe = _recipe(data, tokenizer)
    embedded(config, recipe.vocab_size)
    return _build(Path(config.run_dir) / "store", sources, recipe, data)


def cached_store(data: DataConfig, tokenizer: str) -> TokenStore:
    """The token store of some data, kept in the cache: for planning and for looking at it.

    Raises:
        HbpError: from finding, reading or tokenizing.
    """
    sources, recipe = sources_of(data), _recipe(data, tokenizer)
    named = json.dumps([recipe.identity, data.bad_records, [asdict(source) for source in sources]])
    folder = (_cache(data) or cache_folder()) / STORES / hashlib.blake2b(named.encode(), digest_size=12).hexdigest()
    return _build(folder, sources, recipe, data)


def _recipe(data: DataConfig, tokenizer: str) -> Recipe:
    reading = Reading(tuple(data.columns.items()), tuple(data.roles.items()), data.ignore)
    return recipe_of(tokenizer, data.chat_template, reading)


def _build(folder: Path, sources: Sequence[Source], recipe: Recipe, data: DataConfig) -> TokenStore:
    map_pieces = None
    if data.ray is not None:
        from hbp.data.ray_data import pieces_on

        map_pieces = pieces_on(data.ray)
    return build_store(
        folder,
        sources,
        recipe,
        processes=data.processes,
        skip_bad=data.bad_records == "skip",
        cache=_cache(data),
        cache_bytes=data.cache_gib * GIB,
        map_pieces=map_pieces,
    )


def _cache(data: DataConfig) -> Path | None:
    if data.cache in (OFF, False) or (not data.cache and is_off()):
        return None
    return Path(data.cache).expanduser() if data.cache else cache_folder()


def _prepare_stdlib(data: DataConfig, folder: Path, seed: int) -> tuple[str, str]:
    jsonl, tokenizer, made = folder / "stdlib.jsonl", folder / "tokenizer", folder / "made.json"
    decides = ("short_samples", "long_samples", "longest_chars", "vocab_size")
    wanted = json.dumps({**{name: getattr(data, name) for name in decides}, "seed": seed}, sort_keys=True)
    if not (made.is_file() and made.read_text() == wanted):
        say("making the embedded data set and its tokenizer from this Python's standard library")
        folder.mkdir(parents=True, exist_ok=True)
        write_dataset(
            jsonl,
            seed=seed,
            short_samples=data.short_samples,
            long_samples=data.long_samples,
            longest_chars=data.longest_chars,
        )
        train_tokenizer(jsonl, tokenizer, vocab_size=data.vocab_size)
        made.write_text(wanted)
    return str(jsonl), data.tokenizer or str(tokenizer)


def choose(config: Config, store: TokenStore) -> tuple[Samples, Samples]:
    """The samples that a run trains on, and those held out.

    Raises:
        HbpError: none is left, preference pairs, or nothing to learn.
    """
    data = config.data
    if (store.part != ALONE).any():
        raise HbpError(
            f"{store.place(int((store.part != ALONE).argmax()))} is a preference pair, which `hbp train` has no loss "
            "for yet; plan them with `hbp plan --data` and follow the plan with your own trainer"
        )
    if data.max_length is not None and data.too_long != "drop":
        store = cut_to(store, data.max_length, data.too_long)
    train_ids, eval_ids = split_samples(
        store, seed=config.seed, eval_samples=data.eval_samples, max_length=data.max_length
    )
    samples, held_out = Samples(store, train_ids), Samples(store, eval_ids)
    used = samples.lengths <= (data.max_length or np.inf)
    for what, chosen, targets in (
        ("sample to train on", train_ids, samples.loss_tokens[used]),
        ("sample to evaluate with", eval_ids, held_out.loss_tokens),
    ):
        if len(chosen) and not targets.any():
            raise HbpError(
                f"no {what} has a token to learn ({len(chosen):,} samples, the first: {store.place(int(chosen[0]))}); "
                "look at them with `hbp data`: the roles or the chat template may not fit"
            )
    return samples, held_out


def check_model(config: Config, store: TokenStore, samples: Sequence[Samples]) -> None:
    """Refuse ids that the model cannot embed, and samples beyond its positions.

    Raises:
        HbpError: names the sample's file and line.
    """
    model = embedded(config, store.vocab_size)
    highest = max(source.highest_id for source in store.sources)
    if highest >= model.vocab_size:
        index = next(i for i in range(len(store)) if int(store.sample(i)[0].max()) >= model.vocab_size)
        raise HbpError(
            f"{store.place(index)} has token id {int(store.sample(index)[0].max())} but {config.model.path!r} embeds "
            f"{model.vocab_size} (ids up to {model.vocab_size - 1}); use the model's own tokenizer"
        )
    limit = positions(model)
    for chosen in samples:
        used = np.where(chosen.lengths <= (config.data.max_length or np.inf), chosen.lengths, 0)
        if len(used) and (longest := int(used.argmax())) >= 0 and limit is not None and used[longest] > limit:
            raise HbpError(
                f"{chosen.store.place(int(chosen.ids[longest]))} has {used[longest]} tokens but {config.model.path!r} "
                f"has positions for {limit}; set data.max_length to at most that, or max_position_embeddings (or rope "
                "scaling) in the model's config.json to what it is to learn"
            )


def embedded(config: Config, vocab_size: int) -> Any:
    """The model's configuration, if it embeds a vocabulary of that size.

    Raises:
        HbpError: it does not.
    """
    from hbp.train.model import read_config

    return read_config(config.model.path, vocab_size)


def positions(model: Any) -> int | None:
    """The longest document that a model of this configuration is made for, rope scaling included; None: any."""
    most = getattr(model, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(model, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if factor is None:
        return int(most)
    return max(int(most), int(factor * (original or most)))


def say_summary(config: Config, store: TokenStore) -> None:
    """What is trained on, in a few lines."""
    if store.cut is not None:
        store = open_store(store.folder)
    for line in summary(count(store, config.data.max_length, config.data.too_long), store):
        say(line)
