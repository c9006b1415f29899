"""Measures that need a model to read: sentence embeddings, what is said next, a judge between two responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModel

from adhere.data import Row
from adhere.errors import UserError
from adhere.model.checkpoint_files import CONFIG, one_line
from adhere.model.load import load_network
from adhere.model.policy import Policy
from adhere.reward.reward import Reward

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 64


class Embedder:
    """A sentence-embedding model: a folder or a hub id that sentence-transformers reads; safetensors only."""

    def __init__(self, path: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError("an embedder needs sentence-transformers", fix="pip install 'adhere[eval]'") from error
        if (Path(path) / CONFIG).exists():
            _require_sound(path)
        with one_line("no embedder", path, "give a folder or hub id of a sentence-transformers model"):
            self._model: SentenceTransformer = SentenceTransformer(
                path, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
            network = self._model.transformers_model
        if network is not None and (source := str(network.config._name_or_path)) != path:
            _require_sound(source)

    def relevance(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Cosine between the embeddings of each prompt and its response, in [−1, 1]."""
        one, two = (
            self._model.encode(list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
            for texts in (prompts, responses)
        )
        return [float(a @ b) for a, b in zip(one, two, strict=True)]


def _require_sound(path: str) -> None:
    """Load the network at `path` for its errors alone: sentence-transformers would draw missing weights at random."""
    load_network(path, lambda _: AutoModel, other_head=True)


def follow_up(reader: Policy, rows: Sequence[Row], responses: Sequence[str]) -> list[float | None]:
    """−(1/n) Σ log p(follow-up token | prompt, response), nats, where a row has a `follow_up` text: the logarithm of
    the follow-up's perplexity, so that one surprising row does not outweigh all others. None for rows without, and for
    conversations, whose next turn is the user's and not the model's.

    The context is the prompt, a blank, and the response: before the follow-up in one sequence on a decoder-only model,
    in the encoder on an encoder–decoder.
    """
    told = {n: str(row.fields["follow_up"]) for n, row in enumerate(rows)
            if row.fields.get("follow_up") is not None and isinstance(row.prompt, str)}  # fmt: skip
    found: list[float | None] = [None] * len(rows)
    if told:
        contexts = [f"{rows[n].prompt} {responses[n]}".strip() for n in told]
        names = [f"{rows[n].where or f'row {n + 1}'}, its follow_up" for n in told]
        reading = reader.read(reader.paired(contexts, list(told.values()), names), attention=False, spread=())
        for row, place in enumerate(told):
            own = reading.logprobs[row][reading.response_mask[row]][:-1]  # without the end, which nobody said
            found[place] = -float(own.mean()) if len(own) else None
    return found


def wins(reward: Reward, rows: Sequence[Row], ours: Sequence[str], theirs: Sequence[str]) -> list[float]:
    """For each row 1 where a reward prefers our response to theirs, ½ for a tie, else 0."""
    found: list[float] = []
    starts = range(0, len(rows), BATCH)
    for start in reward.policy.progress(starts, "judging", len(starts)):
        places = range(start, min(start + BATCH, len(rows)))
        prompts = [rows[n].prompt for n in places for _ in range(2)]
        answers = [rows[n].answers for n in places for _ in range(2)]
        said = [text for n in places for text in (ours[n], theirs[n])]
        names = [rows[n].where for n in places for _ in range(2)]
        scores = reward.score(prompts, said, answers, names=names).reward.tolist()
        found += [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return found
