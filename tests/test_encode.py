"""Prompts and responses as tokens: the role of each token through chat templates of six families, what ends a turn,
start tokens, templates that refuse or rewrite, tokenizers without offsets, responses as the model would write them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from transformers import ByT5Tokenizer

from adhere.errors import UserError
from adhere.model.chat import end_tokens, frame
from adhere.model.compose import turns_of
from adhere.model.policy import Policy
from adhere.model.responses import needs_blank
from adhere.model.settings import ChatOptions, Sampling
from adhere.prompt import AnnotatedText, Document, Part, RenderedText, prompt_key
from adhere.row_prompt import prompt_of
from adhere.types import Prompts, Role
from tests.chat_templates import END, TAKES_SYSTEM, TEMPLATES, bpe, policy_of
from tests.families import save, tokenizer

CONTEXT, QUESTION = "Mary went to the garden. Where is John?", "Where is John?"
USER = f"{CONTEXT}\n\nQuestion: {QUESTION}\nAnswer:"


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def said(policy: Policy, prompts: Prompts, role: Role, row: int = 0) -> str:
    """The tokens with one role, as text."""
    return policy.tokenizer.decode(prompts.ids[row][prompts.roles[row] == role])


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_turn_has_its_role_through_every_template(family):
    policy = policy_of(bpe(family))
    system = [{"role": "system", "content": "Be brief."}] if family in TAKES_SYSTEM else []
    reply = {"role": "assistant", "content": "Paris"}
    turns = [*system, *user(" John is in the office.\n"), reply, *user("Where is Mary?")]
    prompts = policy.encode([turns])
    assert said(policy, prompts, Role.SYSTEM) == ("Be brief." if system else "")
    assert "".join(said(policy, prompts, Role.EARLIER).split()) == "Johnisintheoffice.Paris"
    assert said(policy, prompts, Role.USER).strip() == "Where is Mary?"
    assert policy.tokenizer.decode(prompts.ids[0]) == prompts.texts[0] and prompts.chat == (True,)
    assert prompts.current.sum() == (prompts.roles == Role.USER).sum()


@pytest.mark.parametrize("family", [None, *TEMPLATES])
def test_a_chat_a_plain_prompt_fields_and_documents_that_say_the_same_are_the_same_prompt(family):
    policy = policy_of(bpe(family))
    rows = [
        {"prompt": USER},
        {"context": CONTEXT, "question": QUESTION},
        {"documents": [CONTEXT], "question": QUESTION},
        {"prompt": "{context}\n\nQuestion: {question}\nAnswer:", "context": CONTEXT, "question": QUESTION},
    ]
    rows += [{"messages": user(USER)}] if family else []
    prompts = policy.encode([prompt_of(row)[0] for row in rows])
    assert all(torch.equal(ids, prompts.ids[0]) for ids in prompts.ids) and len(set(prompts.texts)) == 1
    assert prompts.guessed.tolist() == [True, False, False, False] + [True] * bool(family)
    for row in (1, 2, 3):
        # The question stands in the context word for word, and is told apart all the same.
        assert said(policy, prompts, Role.DOCUMENT, row).strip() == CONTEXT
        assert said(policy, prompts, Role.QUESTION, row).strip() == QUESTION
        assert "Answer:" in said(policy, prompts, Role.TEMPLATE, row)
    assert said(policy, prompts, Role.USER).strip() == USER


def test_words_of_the_default_system_text_are_not_taken_for_the_users():
    policy = policy_of(bpe("chatml"))
    prompts = policy.encode(["assistant named Mary", prompt_of({"context": "named Mary", "question": "Mary"})[0]])
    assert prompts.texts[0].count("assistant named Mary") == 2
    assert said(policy, prompts, Role.USER) == "assistant named Mary"
    assert prompts.roles[0].nonzero().max() > (prompts.roles[0] == Role.USER).nonzero().min() > 20
    assert said(policy, prompts, Role.DOCUMENT, 1) == "named Mary"


@pytest.mark.parametrize("family", [None, "llama3", "mistral"])
def test_tokens_know_their_document_and_the_characters_they_stand_for(family):
    policy = policy_of(bpe(family))
    documents = ["  Mary went to the garden.", {"title": "Paris", "text": "The café is in the office."}]
    prompts = policy.encode([QUESTION, prompt_of({"documents": documents, "question": QUESTION})[0]])
    texts = ["Mary went to the garden.", "The café is in the office."]
    assert [document.text for document in prompts.documents[1]] == ["  Mary went to the garden.", texts[1]]
    assert (prompts.sources[0] == -1).all()
    for number, text in enumerate(texts):
        mine = prompts.sources[1][:, 0] == number
        spans = prompts.sources[1][mine, 1:].tolist()
        known = [span for span in spans if span[0] >= 0]
        shown = prompts.documents[1][number].text
        # Between them stand only the blanks that tokens begin with.
        assert {shown[end:start] for (_, end), (start, _) in pairwise(known)} <= {"", " "}
        assert shown[known[0][0] : known[-1][1]] == text
        assert len(spans) - len(known) == (0 if number == 0 else len(policy.tokenizer("Paris")["input_ids"]))


def test_characters_of_a_document_hold_where_a_template_trims_and_where_a_token_reaches_beyond_it():
    policy = policy_of(bpe("llama3"))
    row = {"messages": user("{context} Where?\n"), "context": " \n  Mary went"}
    prompts = policy.encode([prompt_of(row)[0]])
    known = prompts.sources[0][prompts.roles[0] == Role.DOCUMENT][:, 1:]
    assert (int(known.min()), int(known.max())) == (4, 13)
    whole = policy_of(tokenizer())  # a token is what stands between blanks
    prompts = whole.encode([prompt_of({"prompt": "{context}, where?", "context": "mary garden"})[0]])
    assert prompts.sources[0].tolist() == [[0, 0, 4], [0, 5, 11], [-1, -1, -1]]


def test_cutting_and_choosing_prompts_keeps_what_is_known_of_their_tokens():
    policy = policy_of(bpe())
    prompts = policy.encode([prompt_of({"documents": ["Mary", "John is"], "question": q})[0] for q in ("Where?", "a")])
    kept = prompts.only(prompts.has(Role.DOCUMENT), left=True)
    assert policy.tokenizer.decode(kept.ids[0]) == "MaryJohn is" and kept.mask.all()
    assert kept.sources[1].tolist() == prompts.sources[1][prompts.roles[1] == Role.DOCUMENT].tolist()
    swapped = prompts.select(torch.tensor([1, 0]))
    assert torch.equal(swapped.roles[0], prompts.roles[1]) and torch.equal(swapped.sources[1], prompts.sources[0])
    part = policy.respond(prompts, ["a", "b"], torch.tensor([0, 1])).groups(1, 2)
    trimmed = part.rollout.prompts if hasattr(part, "rollout") else part[0].prompts
    assert trimmed.documents == prompts.documents[1:] and (trimmed.roles != Role.PADDING).all()


def test_history_is_evidence_only_where_the_row_says_so():
    policy = policy_of(bpe("chatml"))
    turns = [*user("Mary went to the garden."), {"role": "assistant", "content": "Paris"}, *user(QUESTION)]
    asked = [prompt_of({"messages": turns, "history_is_context": flag})[0] for flag in (False, True)]
    prompts = policy.encode(asked)
    assert torch.equal(prompts.ids[0], prompts.ids[1])
    assert said(policy, prompts, Role.EARLIER) == "Mary went to the garden.Paris"
    assert said(policy, prompts, Role.DOCUMENT, 1) == "Mary went to the garden.Paris"
    assert prompts.guessed.tolist() == [True, False]
    assert [document.text for document in prompts.documents[1]] == ["Mary went to the garden.", "Paris"]
    assert prompts.sources[1][prompts.roles[1] == Role.DOCUMENT][-1, [0, 2]].tolist() == [1, 5]


def test_what_a_tool_returned_is_evidence():
    policy = policy_of(bpe("chatml"))
    call = {"role": "assistant", "content": "Paris"}
    prompts = policy.encode([[*user(QUESTION), call, {"role": "tool", "content": "the office"}]])
    assert (said(policy, prompts, Role.USER), said(policy, prompts, Role.DOCUMENT)) == (QUESTION, "the office")


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_turn_ends_with_what_the_template_writes_after_it(family):
    words = bpe(family)
    policy = policy_of(words)
    end = words.convert_tokens_to_ids(END[family])
    assert policy.endings.tokens == end_tokens(words) == {end, 2}
    rollout = policy.paired([user("Where is Mary?")] * 3, ["the garden", f"the garden{END[family]}", ""])
    said = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    assert said[0] == said[1] and [ids[-1] for ids in said] == [end] * 3 and said[2] == [end]
    assert rollout.ended.all()
    plain = Policy(policy.model, words, chat=ChatOptions("off")).paired(["Where is Mary?"], ["the garden"])
    assert plain.response_ids[0, -1] == 2  # no chat, no turn
    cut = policy.respond(policy.encode([user("a")]), ["the garden"], torch.tensor([0]), [False])
    assert not cut.ended.any() and cut.response_ids[0, -1] not in policy.endings.tokens


def test_a_template_that_always_asks_for_a_reply_does_not_end_a_turn_by_it():
    words = bpe("chatml")
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}<start_of_turn>"
    assert frame(words).end is None and policy_of(words).endings.turn == 2


def test_ends_of_the_generation_configuration_count():
    policy = policy_of(bpe())
    policy.network.generation_config.eos_token_id = [2, 5]
    assert policy.endings.tokens == {2, 5} and policy.endings.plain == 2


@pytest.mark.parametrize("family", [None, "llama3", "gemma", "mistral"])
def test_a_start_token_is_set_once(family):
    policy = policy_of(bpe(family, start=True))
    for text in ("Where is Mary?", "<s>Where is Mary?", RenderedText("Where is Mary?")):
        ids = policy.encode([text]).ids[0].tolist()
        assert ids.count(1) == 1 and ids[0] == 1, text


def test_a_tokenizer_that_closes_texts_closes_no_prompt_of_a_decoder():
    decoder, encoder = policy_of(bpe(start=True, end=True)), policy_of(bpe(end=True), encoder=True)
    assert 2 not in decoder.encode(["Where is Mary?"]).ids
    assert decoder.encode(["Where"]).roles[0].tolist()[0] == Role.TEMPLATE
    asked = encoder.encode(["Where is Mary?", "Where is Mary?</s>"])
    assert torch.equal(asked.ids[0], asked.ids[1]) and asked.ids[0].tolist().count(2) == 1
    assert asked.roles[0, -1] == Role.TEMPLATE


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma"])
def test_a_prompt_that_was_rendered_before_is_read_as_it_stands(family):
    policy = policy_of(bpe(family))
    once = policy.encode([user("Where is Mary?")])
    again = policy.encode([once.texts[0]])
    assert torch.equal(once.ids, again.ids) and torch.equal(once.roles, again.roles) and again.chat == (True,)


def test_fields_keep_their_roles_in_a_prompt_that_was_rendered_before():
    policy = policy_of(bpe("llama3"))
    text = policy.encode(["{context} Where?"]).texts[0]
    row = {"prompt": text, "context": "Mary went"}
    prompts = policy.encode([prompt_of(row)[0], prompt_of({"context": "<s> Mary", "question": "Where?"})[0]])
    assert prompts.texts[0] == text.replace("{context}", "Mary went")
    assert said(policy, prompts, Role.DOCUMENT) == "Mary went" and said(policy, prompts, Role.USER) == " Where?"
    assert prompts.texts[1].count("<|start_header_id|>") == 2  # evidence that begins with a token is still evidence


def test_thinking_is_left_out_and_a_thought_that_the_template_opens_is_closed():
    for family in ("qwen3", "thinker"):
        prompts = policy_of(bpe(family)).encode(["Where is Mary?"])
        assert prompts.texts[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n"), family
    policy = policy_of(bpe("qwen3"))
    thought = {"role": "assistant", "content": "<think>\nthe office\n</think>\n\nthe kitchen"}
    prompts = policy.encode([[*user("Where is John?"), thought, *user("Where is Mary?")]])
    assert said(policy, prompts, Role.EARLIER) == "Where is John?the kitchen"


@pytest.mark.parametrize(
    ("family", "turns", "message"),
    [
        ("gemma", [{"role": "system", "content": "Be brief."}, *user("a")],
         "here:1: the chat template refuses the turns system, user (System role not supported); put the system text "
         "into the first user turn"),
        ("mistral", [*user("a"), *user("b")],
         "here:1: the chat template refuses the turns user, user (Conversation roles must alternate user/assistant/"
         "user/assistant/...); let user and assistant alternate"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         [{"role": "system", "content": "Be brief."}, *user("a")],
         "here:1: the chat template leaves out turn 1 (system); leave that turn out, or put its text into the user's "
         "turn"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", user("Where is Mary?"),
         "here:1: the chat template rewrites the text of turn 1 (user); give the prompt as plain text with --chat off"),
        ("{{ messages[0].content + none }}", user("a"), "here:1: the chat template refuses the turns user (can only"),
        ({"tools": "{{ messages }}", "rag": "{{ messages }}"}, user("a"),
         "here:1: the chat template refuses the turns user (This model has multiple chat templates"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_take_the_turns_is_one_line(family, turns, message):
    words = bpe("chatml")
    words.chat_template = TEMPLATES.get(family, family) if isinstance(family, str) else family
    with pytest.raises(UserError) as caught:
        policy_of(words).encode([turns], names=["here:1"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_repeats_a_turn_marks_it_twice():
    words = bpe("chatml")
    words.chat_template = "{% for m in messages %}Mary: {{ m.content }} John: {{ m.content }}{% endfor %}"
    policy = policy_of(words)
    assert said(policy, policy.encode([user("Paris")]), Role.USER).split() == ["Paris", "Paris"]


def test_a_tokenizer_without_offsets_marks_roles_all_the_same():
    words = ByT5Tokenizer()
    assert not words.is_fast
    prompt, _ = prompt_of({"documents": ["Mary: é.", "x"], "question": "Who?"})
    policy = policy_of(words, encoder=True)
    prompts = policy.encode([prompt])
    assert said(policy, prompts, Role.DOCUMENT) == "Mary: é.x" and said(policy, prompts, Role.QUESTION) == "Who?"
    marked = prompts.sources[0]
    assert marked[:, 0].unique().tolist() == [-1, 0, 1] and (marked[:, 1:] == -1).all()


def test_chat_and_system_as_the_user_asks():
    words = bpe("chatml")
    asked = policy_of(words, chat=ChatOptions(system="Be brief.")).encode(["Where is Mary?", prompt_of(
        {"system": "the office", "prompt": "Where is Mary?"})[0]])  # fmt: skip
    assert "system\nBe brief.<|im_end|>" in asked.texts[0] and "system\nthe office<|im_end|>" in asked.texts[1]
    assert "Be brief." not in asked.texts[1]
    off = policy_of(words, chat=ChatOptions("off"))
    plain = off.encode(["Where is Mary?", prompt_of({"system": "the office", "question": "Who?"})[0]])
    assert plain.texts == ("Where is Mary?", "the office\n\nQuestion: Who?\nAnswer:") and plain.chat == (False, False)
    assert said(off, plain, Role.SYSTEM, 1) == "the office"
    assert off.encode([user("Where is Mary?")]).chat == (True,)
    assert not policy_of(bpe()).takes_chat and policy_of(words).takes_chat
    assert turns_of(words, "a", ChatOptions(system="b")) == [{"role": "system", "content": "b"}, *user("a")]
    assert turns_of(words, "a", ChatOptions("off")) is None is turns_of(words, "<s>a", ChatOptions())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy_of(bpe(), chat=ChatOptions("on")), "no chat template, and chat is on"),
        (lambda: policy_of(bpe(), chat=ChatOptions(system="a")), "no chat template, and a system text needs one"),
        (lambda: ChatOptions("off", system="a"), "a system text goes into the chat template, and chat is off"),
        (lambda: ChatOptions(system=" "), "system is empty"),
        (lambda: ChatOptions(stop=("",)), "a stop text is empty"),
        (lambda: ChatOptions("of"), "'of'"),  # type of a Literal
    ],
)
def test_options_that_cannot_be_met(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("Answer:", "the garden", " the garden"),
        ("Answer:", " the garden", " the garden"),
        ("Answer: ", "the garden", "the garden"),
        ("Answer:\n", "the garden", "the garden"),
        ("Answer", ": the garden", ": the garden"),
        ("Answer: (", "the garden", "the garden"),
        ("答案：", "花园", "花园"),
        ("Answer:", "花园", "花园"),
        ("Answer:", "", ""),
        ("Answer:", "\nthe garden", "\nthe garden"),
    ],
)
def test_a_response_to_plain_text_is_written_as_the_text_would_go_on(prompt, response, expected):
    words = bpe()
    policy = policy_of(words)
    rollout = policy.paired([prompt], [response])
    ids = rollout.response_ids[0, :-1].tolist()
    assert words.decode(ids) == expected and rollout.responses == (response,)
    # Prompt and response are the tokens of the whole text, where no token reaches over the seam.
    if not prompt.endswith(" ") and not response.startswith("\n"):
        assert policy.encode([prompt]).ids[0].tolist() + ids == words(prompt + expected)["input_ids"]


@pytest.mark.parametrize(("family", "blank"), [("chatml", ""), ("llama3", ""), ("mistral", " ")])
def test_a_response_in_a_chat_begins_as_the_template_begins_a_reply(family, blank):
    words = bpe(family)
    policy = policy_of(words)
    rollout = policy.paired([user("Where is Mary?")] * 2, ["the garden", " the garden"])
    assert torch.equal(rollout.response_ids[0], rollout.response_ids[1])
    assert words.decode(rollout.response_ids[0, :-1]) == f"{blank}the garden"
    turns = [*user("Where is Mary?"), {"role": "assistant", "content": "the garden"}]
    whole = words.apply_chat_template(turns, tokenize=False).rstrip("\n")
    read = policy.encode([user("Where is Mary?")]).ids[0].tolist() + rollout.response_ids[0].tolist()
    assert words(whole, add_special_tokens=False)["input_ids"] == read


@pytest.mark.parametrize("encoder", [False, True])
def test_a_sample_is_the_same_tokens_when_it_comes_back_as_text(encoder):
    policy = policy_of(bpe(), encoder=encoder)
    prompts = policy.encode(["Where is Mary?", "The capital of France is"])
    drawn = policy.sample(prompts, 8, sampling=Sampling(max_new_tokens=6), seed=3)
    for row in range(len(drawn)):
        ids = drawn.response_ids[row][drawn.response_mask[row]]
        text = drawn.responses[row]
        canonical = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        if text.startswith(" ") and not encoder and canonical == ids.tolist():  # else chance spelt it otherwise
            again = policy.respond(prompts, [text], drawn.prompt_index[row : row + 1], [bool(drawn.ended[row])])
            assert again.response_ids[0].tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_stop_text_over_several_tokens_ends_a_response_and_is_no_part_of_it(family, tmp_path):
    folder = save(family, tmp_path)
    free = Policy.load(folder, device="cpu")
    greedy = Sampling(temperature=0, max_new_tokens=12)
    whole = free.sample(free.encode(["mary is in the garden ."]), sampling=greedy)
    words = whole.responses[0].split()
    stop = " ".join(words[3:5])
    place = whole.responses[0].index(stop)
    policy = Policy.load(folder, device="cpu", stop=[stop])
    drawn = policy.sample(policy.encode(["mary is in the garden ."]), sampling=greedy)
    size = int(drawn.lengths[0])
    assert bool(drawn.ended[0]) and drawn.responses[0] == whole.responses[0][:place]
    assert size <= 5 < int(whole.lengths[0])
    assert drawn.response_ids[0, :size].tolist() == whole.response_ids[0, :size].tolist()
    # As ids it ended, too; as a text it is closed with the stop text, which the model is to write.
    again = policy.respond(drawn.prompts, [drawn.response_ids[0, :size].tolist()], torch.tensor([0]))
    assert again.ended.all() and again.responses == drawn.responses
    given = policy.paired(["mary is in the garden ."], [drawn.responses[0]])
    assert given.response_ids[0].tolist() == drawn.response_ids[0, :size].tolist() and given.ended.all()


def test_a_stop_text_that_is_a_special_token_is_an_end_token():
    policy = policy_of(bpe(), chat=ChatOptions(stop=("<|eot_id|>", "\n")))
    end = policy.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in policy.endings.tokens and policy.endings.texts == ("\n",) and policy.endings.plain == end
    assert policy.endings.cut("Paris\nQuestion") == "Paris"
    ids = torch.tensor([policy.tokenizer("a\n")["input_ids"], policy.tokenizer("aa")["input_ids"]])
    assert policy.endings.reached(ids).tolist() == [True, False]


def test_where_a_blank_belongs():
    assert needs_blank("is", "Paris") and needs_blank('said "no"', "Paris") and needs_blank("2 +", "2")
    assert not any(needs_blank(*pair) for pair in [("", "a"), ("a", ""), ("is ", "a"), ('is "', "a"), ("a", "). b")])


def test_an_annotated_text_is_its_text_and_keeps_its_parts():
    text = AnnotatedText([Part("a ", Role.DOCUMENT, 0, 0), Part("b", Role.QUESTION)], [Document("a ")])
    assert text == "a b" and copy.deepcopy(text).parts == text.parts
    assert len({prompt_key(one) for one in (text, "a b", RenderedText("a b"), user("a b"), user(text))}) == 5
