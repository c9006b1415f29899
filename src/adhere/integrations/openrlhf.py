"""OpenRLHF's remote reward model: what its client posts, taken apart (`adhere serve` answers at `/openrlhf`).

Read in OpenRLHF 0.11.2, `openrlhf/utils/agent.py`: one request a sample, `{"query": [text], "prompts": [text],
"labels": [text]}`; a query is the prompt and the response as ids, decoded with special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from adhere.errors import UserError
from adhere.prompt import RenderedText
from adhere.ranking import Group


def groups_of(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str | None]
) -> list[Group]:
    """Each run of equal prompts as a group, responses as ids: what closes with an end token ended by itself.

    Raises `UserError` for lists of unequal length, or a query that does not begin with its prompt.
    """
    if len(queries) != len(prompts) or (labels and len(labels) != len(prompts)):
        raise UserError(
            f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels",
            where="openrlhf",
            fix="send as many of each (labels may be left out)",
        )
    groups: list[Group] = []
    for place, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        response = _response(tokenizer, query, prompt, f"query[{place}]")
        label = labels[place] if labels else None
        answers = (label,) if label and label.strip() else ()
        text = RenderedText(prompt)
        if groups and (groups[-1].prompt, groups[-1].answers) == (text, answers):
            last = groups.pop()
            groups.append(Group(text, (*last.responses, response), (*last.ended, True), answers, last.where))
        else:
            groups.append(Group(text, (response,), (True,), answers, f"prompts[{place}]"))
    return groups


def _response(tokenizer: PreTrainedTokenizerBase, query: str, prompt: str, where: str) -> list[int]:
    """The ids after the prompt. Ids first: decoded text need not begin with the text that was encoded."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole, asked = ids(query), ids(prompt)
    if whole[: len(asked)] == asked:
        found = whole[len(asked) :]
    elif query.startswith(prompt):
        found = ids(query[len(prompt) :])
    else:
        raise UserError(
            "the query does not begin with its prompt",
            where=where,
            fix="serve with the tokenizer of the model in training",
        )
    if not found:
        raise UserError("the response is empty", where=where, fix="leave it out")
    return found
