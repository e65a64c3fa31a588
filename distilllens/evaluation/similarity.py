"""Similarity of answers and references: cosine of sentence embeddings (Reimers & Gurevych 2019).

The model is one of sentence-transformers, from a folder or the hub. Nothing that a stranger's
folder brings along is run: its modules must be the library's own, its weights safetensors.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilllens.errors import ConfigError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.out_of_memory import with_less
from distilllens.model_files import check_settings, check_source, check_weights, unloadable
from distilllens.runtime.libraries import quiet_libraries

BATCH_TEXTS = 64
"""Texts that run through the model at once; too little memory halves it."""
SLICE_TEXTS = 512
"""Texts sorted by length together: what the progress moves by."""
MODULES = "modules.json"
OWN_MODULES = "sentence_transformers."
"""Prefix of the classes that a model may be made of."""


class SentenceModel:
    """Embeds texts; keeps the embeddings of references, which recur with every seed.

    Args:
        path: Folder, or name of a hub repository.
        revision: Commit hash of a hub repository.
        device: Where it runs.

    Raises:
        ConfigError: As `check_sentence_model`; it cannot be loaded.
    """

    def __init__(self, path: str, *, revision: str | None, device: torch.device) -> None:
        offline = check_sentence_model(path, revision)
        quiet_libraries()
        # An extra: by its name, as requirements.txt does not have it.
        library = importlib.import_module("sentence_transformers")
        try:
            self._model = library.SentenceTransformer(
                path,
                device=str(device),
                revision=revision,
                trust_remote_code=False,
                local_files_only=offline,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # whatever a library stumbles over in a stranger's file
            raise unloadable(path, error) from None
        self._known: dict[str, Tensor] = {}
        self._batch_texts = BATCH_TEXTS

    def embed(self, texts: Sequence[str], advance: Callable[[int], None]) -> Tensor:
        """Returns embeddings of length 1, float32 on the CPU, one row for each text.

        A text is cut to the model's own longest (256 word pieces for all-MiniLM-L6-v2).
        """
        parts = []
        for start in range(0, len(texts), SLICE_TEXTS):
            part = list(texts[start : start + SLICE_TEXTS])
            encode = partial(self._encode, part)
            embedded_PD, self._batch_texts = with_less(
                encode, self._batch_texts, one="one text of the similarity"
            )
            parts.append(embedded_PD)
            advance(len(part))
        return torch.cat(parts)

    def _encode(self, texts: list[str], batch_size: int) -> Tensor:
        embedded: Tensor = self._model.encode(
            texts,
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return embedded.float().cpu()

    def similarities(
        self, samples: Sequence[Mapping[str, Any]], advance: Callable[[int], None]
    ) -> list[float]:
        """Returns for each sample the cosine of its answer and the reference nearest to it.

        Args:
            samples: Lines of samples.jsonl; ``answer`` and ``references`` are read.
            advance: Called with numbers of texts, `count_texts` in all for a model that is new.

        Returns:
            Cosines in [−1, 1]; 0 for a blank answer, which says nothing.
        """
        references = _references(samples)
        new = [text for text in references if text not in self._known]
        if new:
            self._known.update(zip(new, self.embed(new, advance), strict=True))
        advance(len(references) - len(new))
        answers_AD = self.embed([sample["answer"] for sample in samples], advance)
        scores = []
        for sample, answer_D in zip(samples, answers_AD, strict=True):
            known_RD = torch.stack([self._known[text] for text in sample["references"]])
            cosine = float((known_RD @ answer_D).max().clamp(-1, 1))
            scores.append(cosine if sample["answer"].strip() else 0.0)
        return scores


def count_texts(samples: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many texts `SentenceModel.similarities` embeds, or knows."""
    return len(samples) + len(_references(samples))


def _references(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(text for sample in samples for text in sample["references"]))


def check_sentence_model(path: str, revision: str | None) -> bool:
    """Looks at a model before anything of it is loaded; returns whether to stay off the network.

    Raises:
        ConfigError: The package is not installed; no such folder or repository; the folder is no
            model of sentence-transformers, names code of its own, or holds pickled weights.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            f"similarity={path} needs sentence-transformers, which is not installed",
            fix="bash scripts/setup.sh similarity, or python -m pip install "
            "'sentence-transformers>=6.2'",
        )
    offline = check_source(path, MODULES, revision, kind="sentence model", option="--similarity")
    check_settings(path, "config.json", trust_remote_code=False)
    check_weights(path)
    file = Path(path) / MODULES
    if file.is_file():
        _check_modules(path, file)
    return offline


def _check_modules(path: str, file: Path) -> None:
    try:
        types = [str(module["type"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"cannot load {path}", why=f"{MODULES}: {error}") from None
    if foreign := [name for name in types if not name.startswith(OWN_MODULES)]:
        raise ConfigError(
            f"cannot load {path}",
            why=f"{MODULES} asks for the class {foreign[0]!r:.100}, which is not the library's own",
            fix="choose a model that is made of sentence-transformers' modules",
        )


def sentence_model_fingerprint(path: str, revision: str | None) -> str:
    """Returns a hash of weights, tokenizer and modules; see `checkpoint_fingerprint`."""
    folder = Path(path)
    digest = hashlib.sha256(checkpoint_fingerprint(path, revision).encode())
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/config.json")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
