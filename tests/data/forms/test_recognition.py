"""Each form of a row: how it is recognized, and its text under a small chat template."""

import json

import pytest

from megatron_gkd.data.forms.recognition import Conventions, recognize
from megatron_gkd.data.rows import BadRow, parse_row, read_row
from megatron_gkd.data.template import RowRenderer

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CHAT = "user: q|assistant: a|"
CALL = {"name": "add", "arguments": {"x": 1}}
RENDERED_CALL = 'assistant: <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>|'


@pytest.fixture
def render(tokenizer, trained_text):
    """`render(row)`: the form, the whole text (of each message `role: content|`), and the text that is trained on."""

    def run(row, *, allows_prompts=False, for_teacher=False, **conventions):
        written = recognize(row, Conventions(**conventions))
        parsed = read_row(written, allows_prompts=allows_prompts)
        input_ids, labels, _ = RowRenderer(tokenizer)(parsed.for_teacher() if for_teacher else parsed)
        whole = tokenizer.decode(input_ids).replace("<|im_end|>\n", "|").replace("<|im_end|>", "|")
        for role in ("system", "developer", "user", "assistant", "tool"):
            whole = whole.replace(f"<|im_start|>{role}\n", f"{role}: ")
        return written.form, whole, trained_text(tokenizer, labels).replace("<|im_end|>", "|")

    return run


@pytest.mark.parametrize(
    ("row", "form", "whole"),
    [
        ({"messages": [Q, A]}, "messages", CHAT),
        ({"messages": json.dumps([SYSTEM, Q, A])}, "messages", "system: s|" + CHAT),
        ({"messages": str([Q, A])}, "messages", CHAT),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]}, "messages", CHAT),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "conversations",
            "system: s|" + CHAT,
        ),
        (
            {"conversation": [{"human": "q", "assistant": "a"}, {"user": "q2", "gpt": "a"}]},
            "conversation",
            CHAT + "user: q2|assistant: a|",
        ),
        ({"instruction": "q", "input": "i", "output": "a"}, "instruction + input + output", "user: q\ni|assistant: a|"),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction + input + output", CHAT),
        ({"instruction": "q", "output": "a", "text": "all"}, "instruction + input + output", CHAT),
        ({"Instruction": "q", "Response": "a"}, "instruction + input + response", CHAT),
        ({"query": "q", "response": "a", "answer": "1"}, "query + response", CHAT),
        ({"query": "q", "completion": "a"}, "query + completion", CHAT),
        ({"question": "q", "answer": "a"}, "question + answer", CHAT),
        ({"question": "q", "answers": ["a", "b"]}, "question + answers", CHAT),
        ({"problem": "q", "solution": "a"}, "problem + solution", CHAT),
        ({"input": "q", "target": "a"}, "input + target", CHAT),
        ({"input": "q", "output": "a", "system_prompt": "s"}, "input + output", "system: s|" + CHAT),
        ({"prompt": "q", "answer": "a"}, "prompt + answer", CHAT),
        ({"query": "q", "content": "a"}, "query + content", CHAT),
        (
            {"query": "q", "response": "a", "history": [["q0", "a0"]], "system": "s"},
            "query + response",
            "system: s|user: q0|assistant: a0|" + CHAT,
        ),
        (
            {"query": "q", "response": "a", "history": "[['q0', 'a0']]"},
            "query + response",
            "user: q0|assistant: a0|" + CHAT,
        ),
        ({"prompt": [SYSTEM, Q], "completion": [A]}, "prompt + completion (messages)", "system: s|" + CHAT),
        ({"prompt": [Q], "response": "a"}, "prompt + response", CHAT),
        ({"prompt": [Q], "completion": "a"}, "prompt + completion", CHAT),
        ({"prompt": "q", "messages": [Q, A]}, "messages", CHAT),
        ({"problem": "x", "solution": "y", "answer": "1", "messages": [Q, A]}, "messages", CHAT),
        ({"messages": [Q, A], "system": " ", "history": [], "query": ""}, "messages", CHAT),
        ({"messages": [Q, {**A, "loss": False, "name": "n"}]}, "messages", CHAT),
    ],
)
def test_a_conversation_in_each_form(render, row, form, whole):
    assert render(row) == (form, whole, "a|")


@pytest.mark.parametrize(
    ("row", "form", "whole", "trained"),
    [
        ({"prompt": "q", "response": "a"}, "prompt + response (plain text)", "qa|", "a|"),
        ({"prompt": "q", "completion": "a"}, "prompt + completion (plain text)", "qa|", "a|"),
        (
            {"prompt": "q", "response": "a", "answer": "1"},
            "prompt + response (plain text)",
            "qa|",
            "a|",
        ),
        ({"text": "qa"}, "text (plain text)", "qa|", "a|"),
    ],
)
def test_plain_text_in_each_form(render, row, form, whole, trained):
    assert render(row) == (form, whole, trained)


@pytest.mark.parametrize(
    ("row", "form", "whole"),
    [
        ({"prompt": "q"}, "prompt (plain text)", "q"),
        ({"prompt": [Q]}, "prompt", "user: q|assistant: "),
        ({"prompt": [Q, A, Q]}, "prompt", CHAT + "user: q|assistant: "),
        ({"messages": [Q]}, "messages", "user: q|assistant: "),
        ({"conversations": [{"from": "human", "value": "q"}]}, "conversations", "user: q|assistant: "),
        ({"question": "q"}, "question", "user: q|assistant: "),
        ({"instruction": "q", "input": "i"}, "instruction + input", "user: q\ni|assistant: "),
        ({"query": "q", "history": [["q0", "a0"]]}, "query", "user: q0|assistant: a0|user: q|assistant: "),
    ],
)
def test_a_prompt_alone_in_each_form(render, row, form, whole):
    assert render(row, allows_prompts=True) == (form, whole, "")
    if row != {"prompt": [Q, A, Q]}:
        with pytest.raises(BadRow, match=r"^no assistant turn: "):
            render(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"instruction": "q", "input": "i", "output": "a"},
        {"query": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"prompt": [Q], "completion": [A]},
        {"prompt": "q", "answer": "a"},
    ],
)
def test_the_teacher_reads_its_own_prompt_in_each_form(render, row):
    assert render(row | {"teacher_prompt": "t"}, for_teacher=True)[1:] == ("user: t|assistant: a|", "a|")


def test_the_teacher_reads_its_own_prompt_of_plain_text(render):
    for response in ("response", "completion"):
        row = {"prompt": "q", response: "a", "teacher_prompt": "t"}
        assert render(row, for_teacher=True)[1:] == ("ta|", "a|")


class TestSystem:
    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [Q, A]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "q", "output": "a"},
            {"query": "q", "response": "a", "system": ""},
            {"prompt": [Q], "completion": [A]},
        ],
    )
    def test_the_recipes_is_for_conversations_without_one(self, render, row):
        assert render(row, system="S")[1] == "system: S|" + CHAT

    def test_the_rows_wins(self, render):
        for row in (
            {"messages": [SYSTEM, Q, A]},
            {"messages": [Q, A], "system": "s"},
            {"messages": [SYSTEM, Q, A], "system": "s"},
        ):
            assert render(row, system="S")[1] == "system: s|" + CHAT
        assert render({"messages": [{**SYSTEM, "role": "developer"}, Q, A]}, system="S")[1] == "developer: s|" + CHAT

    def test_plain_text_and_token_ids_have_none(self, render):
        assert render({"prompt": "q", "response": "a"}, system="S")[1] == "qa|"
        assert parse_row({"prompt_token_ids": [1], "response_token_ids": [2]}, conventions=Conventions("S")).prompt == [
            1
        ]


class TestTools:
    @pytest.mark.parametrize("role", ["tool_call", "function_call", "function-call"])
    @pytest.mark.parametrize("content", [CALL, json.dumps(CALL), json.dumps({**CALL, "arguments": '{"x": 1}'}), [CALL]])
    def test_calls_become_the_assistants(self, render, role, content):
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": content}]}
        assert render(row)[1] == "user: q|" + RENDERED_CALL

    def test_calls_join_each_other_and_the_text_before_them(self):
        call = {"role": "tool_call", "content": json.dumps(CALL)}
        row = parse_row({"messages": [Q, A, call, call, {"role": "tool_response", "content": "2"}, call]})
        assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
        assert row.messages[1]["content"] == "a" and len(row.messages[1]["tool_calls"]) == 2
        assert row.messages[3]["tool_calls"] == [{"type": "function", "function": CALL}]

    @pytest.mark.parametrize("role", ["tool", "tool_response", "function_response", "observation", "observations"])
    def test_results_become_the_tools(self, render, role):
        row = {"messages": [Q, {"role": "tool_call", "content": CALL}, {"role": role, "content": "2"}, A]}
        assert render(row)[1] == "user: q|" + RENDERED_CALL + "tool: 2|assistant: a|"

    def test_a_role_of_the_template_is_kept(self):
        messages = [Q, {"role": "observation", "content": "2"}, {"role": "critic", "content": "c"}, A]
        roles = Conventions(template_roles=frozenset({"observation", "critic"}))
        kept = parse_row({"messages": messages}, conventions=roles).messages
        assert [message["role"] for message in kept] == ["user", "observation", "critic", "assistant"]
        both = Conventions(template_roles=frozenset({"observation", "critic", "tool"}))
        assert parse_row({"messages": messages}, conventions=both).messages[1]["role"] == "tool"


def test_further_keys_of_a_message_are_kept():
    message = {"from": "gpt", "value": "a", "loss": 0.5, "reasoning_content": "r"}
    row = parse_row({"conversations": [{"from": "human", "value": "q"}, message]})
    assert row.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert row.losses == (None, 0.5)


def test_the_numbers_of_answers_are_text(render):
    assert render({"question": "q", "answer": 42})[1] == "user: q|assistant: 42|"


def test_image_and_video_are_lists_of_one():
    row = parse_row({"query": "<image>q", "answer": "a", "image": "cat.png"}, reads_images=True)
    assert row.images == ("cat.png",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [Q, A], "prompt": "x", "response": "y"},
            "messages beside prompt and response, and no message has",
        ),
        (
            {"messages": [Q, A], "query": "x"},
            "messages beside query, and no message has that content; remove or rename",
        ),
        ({"messages": [Q, A], "conversations": [Q, A]}, "messages and conversations may each be the conversation"),
        ({"messages": [Q, A], "history": [["q", "a"]]}, "messages beside history"),
        ({"messages": [SYSTEM, Q, A], "system": "other"}, "system beside messages that begin with a system message"),
        (
            {"prompt": "x", "query": "y", "response": "z"},
            "prompt and query may each be the prompt; rename or remove all",
        ),
        ({"question": "x", "problem": "y", "answer": "z"}, "question and problem may each be the prompt"),
        ({"question": "x", "input": "y", "answer": "z"}, "question and input may each be the prompt"),
        ({"problem": "x", "solution": "y", "answer": "z"}, "answer and solution may each be the response"),
        ({"prompt": "x", "response": "y", "completion": "z"}, "response and completion may each be the response"),
        ({"instruction": "x", "output": "y", "response": "z"}, "response and output may each be the response"),
        (
            {"prompt": "x", "response": "y", "system": "s"},
            "system beside a prompt that is text without a chat template",
        ),
        ({"prompt": "x", "response": "y", "history": [["q", "a"]]}, "history beside a prompt that is text"),
        (
            {"prompt": [Q], "response": "y", "history": [["q", "a"]]},
            "history beside prompt, which is a list of messages",
        ),
    ],
)
def test_conflicting_keys(row, message):
    with pytest.raises(BadRow) as error:
        parse_row(row)
    assert str(error.value).startswith("conflicting keys: " + message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{**Q, "role": "usr"}, A]},
            "unknown role: messages[0].role = 'usr': must be system, developer, us",
        ),
        ({"conversations": [{"from": "humn", "value": "q"}]}, "unknown role: conversations[0].from = 'humn': must be"),
        (
            {"conversations": [{"from": "human"}]},
            "wrong type: conversations[0].content must be a string or a list, but is",
        ),
        ({"conversation": [{"human": 1, "assistant": "a"}]}, "wrong type: conversation[0].human must be a string"),
        ({"messages": "[1"}, "wrong type: messages must be a list, but is a string that is not JSON: "),
        (
            {"messages": [Q, {"role": "tool_call", "content": "x"}]},
            "wrong type: messages[1].content must be a list, but",
        ),
        (
            {"messages": [Q, {"role": "tool_call", "content": "{}"}]},
            "wrong type: messages[1].content: name must be a str",
        ),
        ({"instruction": 1, "output": "a"}, "wrong type: instruction must be a string, but is a number"),
        ({"instruction": "", "output": "a"}, "empty prompt: instruction is empty"),
        ({"query": " ", "response": "a"}, "empty prompt: query is empty"),
        ({"question": "q", "answer": " "}, "empty response: answer is empty"),
        ({"question": "q", "answer": {"a": 1}}, "wrong type: answer must be a string, but is an object"),
        (
            {"query": "q", "respones": "a"},
            "no assistant turn: the row has a prompt (query) but no response; did you mean",
        ),
        (
            {"query": "q", "history": [["a"]], "response": "a"},
            "wrong type: history[0] must be a list of a query and its",
        ),
        (
            {"query": "q", "history": [["a", None]], "response": "a"},
            "wrong type: history[0][1] must be a string, but is m",
        ),
        ({"query": "q", "history": "x", "response": "a"}, "wrong type: history must be a list, but is a string that"),
        ({"prompt": [Q], "completion": [Q]}, "no assistant turn: completion has no message of the assistant"),
        ({"prompt": "q", "completion": [A]}, "wrong type: prompt must be a list of messages as completion is, but is"),
        ({"system": 1, "query": "q", "response": "a"}, "wrong type: system must be a string, but is a number"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "no assistant turn: the row has a prompt but no response; only",
        ),
        ("text", "not an object: a row must be an object, but this one is a string"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(BadRow) as error:
        parse_row(row)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
