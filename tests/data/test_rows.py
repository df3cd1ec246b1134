import pytest

from megatron_gkd.data.rows import BadRow, Conversation, PlainText, TokenIds, parse_row

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
NEEDS = "a row needs `messages`, or a prompt (prompt, query, instruction, question, problem, input) and its `response`"


def test_a_conversation_ends_with_its_last_assistant_turn():
    row = parse_row({"messages": [USER, ASSISTANT, USER]})
    assert row == Conversation([USER, ASSISTANT])


def test_prompt_and_response_are_text_or_messages():
    assert parse_row({"prompt": "a", "response": "b", "extra": 1}) == PlainText("a", "b")
    assert parse_row({"prompt": [USER], "response": "hello"}) == Conversation([USER, ASSISTANT])


def test_a_prompt_alone_is_a_row_where_that_is_allowed():
    assert parse_row({"messages": [USER]}, allows_prompts=True) == Conversation([USER])
    assert parse_row({"prompt": [USER], "tools": "[]"}, allows_prompts=True) == Conversation([USER])
    assert parse_row({"prompt": "hi"}, allows_prompts=True) == PlainText("hi", None)
    assert parse_row({"messages": [USER, ASSISTANT, USER]}, allows_prompts=True) == Conversation([USER, ASSISTANT])
    for row in ({"messages": []}, {"prompt": "a", "response": " "}):
        with pytest.raises(BadRow):
            parse_row(row, allows_prompts=True)


def test_tools_may_be_json_text_and_null_counts_as_absent():
    tool = {"type": "function", "function": {"name": "add"}}
    assert parse_row({"messages": [USER, ASSISTANT], "tools": [tool]}).tools == [tool]
    assert parse_row({"messages": [USER, ASSISTANT], "tools": '[{"type": "function"}]'}).tools == [{"type": "function"}]
    assert parse_row({"messages": [USER, ASSISTANT], "tools": None, "prompt": None}).tools is None
    assert parse_row({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"a": 1}}).template_kwargs == {"a": 1}


def test_a_turn_of_tool_calls_needs_no_content():
    assert parse_row({"messages": [USER, CALL]}).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([USER], "not an object: a row must be an object, but this one is a list"),
        (None, "not an object: a row must be an object, but this one is null"),
        ({}, f"no messages: {NEEDS}; this one has nothing"),
        ({"b": 1, "a": 1}, f"no messages: {NEEDS}; this one has a, b"),
        ({"mesages": []}, f"no messages: {NEEDS}; this one has mesages; did you mean messages in place of mesages?"),
        ({"messages": "hi"}, "wrong type: messages must be a list, but is a string"),
        ({"messages": ["hi"]}, "wrong type: messages[0] must be an object, but is a string"),
        ({"messages": [{"content": "hi"}]}, "wrong type: messages[0].role must be a string, but is missing"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "wrong type: messages[1].content must be a string or a list, but is missing",
        ),
        ({"messages": [{**USER, "content": 3}]}, "wrong type: messages[0].content must be a string or a list, but is"),
        (
            {"messages": [{**USER, "content": [3]}, ASSISTANT]},
            "wrong type: messages[0].content[0] must be an object, but is a number",
        ),
        (
            {"messages": [{**CALL, "tool_calls": {}}]},
            "wrong type: messages[0].tool_calls must be a list",
        ),
        ({"messages": []}, "no assistant turn: the roles are: no message at all"),
        ({"messages": [USER, USER]}, "no assistant turn: the roles are: user, user"),
        ({"prompt": "hi"}, "no assistant turn: the row has a prompt but no response"),
        ({"prompt": 1, "response": "b"}, "wrong type: prompt must be a string or a list, but is a number"),
        ({"prompt": "a", "response": True}, "wrong type: response must be a string, but is true or false"),
        ({"prompt": "a", "response": " \n"}, "empty response: response is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "empty response: messages[1] (assistant) has neither content nor tool_calls",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, "wrong type: tools[0] must be an object, but is a number"),
        ({"messages": [USER, ASSISTANT], "tools": "add"}, "wrong type: tools is text but not JSON: Expecting value"),
        (
            {"prompt_token_ids": [1, "2"], "response_token_ids": [3]},
            "wrong type: prompt_token_ids[1] must be a token id, but is '2'",
        ),
        ({"prompt_token_ids": [1, True], "response_token_ids": [3]}, "wrong type: prompt_token_ids[1] must be a token"),
        ({"prompt_token_ids": [1], "response_token_ids": []}, "empty response: response_token_ids is empty"),
        ({"prompt_token_ids": [1]}, "no assistant turn: the row has prompt_token_ids but no response_token_ids"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]},
            "wrong type: chat_template_kwargs must be an object, but is a list",
        ),
    ],
)
def test_a_bad_row_has_a_reason_and_a_detail(row, message):
    with pytest.raises(BadRow) as error:
        parse_row(row)
    assert str(error.value).startswith(message)
    assert str(error.value) == f"{error.value.reason}: {error.value.detail}"


def test_token_ids_come_before_the_text_beside_them():
    row = {"prompt": "a", "response": "b", "prompt_token_ids": [1, 2], "response_token_ids": [3], "masked": True}
    assert parse_row(row) == TokenIds([1, 2], [3], masked=True)
    assert parse_row({"prompt_token_ids": [1]}, allows_prompts=True) == TokenIds([1], None)
