"""The contract of rollout engines. An engine's tests derive from `RolloutEngineContract` and add a fixture of results.

    class TestMyEngine(RolloutEngineContract):
        @pytest.fixture(scope="class")
        @classmethod
        def results(cls):
            return run_requests(MyEngine(CHECKPOINT(), ...))          # or the same in every rank of a world

The engine samples from `CHECKPOINT()` (qwen3, vocabulary 99, EOS 2), in fp32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gkd.data.end_of_turn import find_end_of_turn
from megatron_gkd.rollout.base import Completion, RolloutEngine, Sampling

CHECKPOINT = functools.partial(tiny_checkpoint, "qwen3", seed=5, head_dim=32)  # the smallest that vLLM has on a CPU
EOS = 2
VERSION = 7
GREEDY = Sampling(max_completion_length=16, temperature=0, ignore_eos=True)
DRAWN = Sampling(max_completion_length=20)


@dataclass(frozen=True)
class Request:
    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[int]

    @classmethod
    def of(cls, lengths: list[int], sampling: Sampling, first_seed: int = 0) -> Request:
        generator = torch.Generator().manual_seed(11)
        prompts = [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]
        return cls(prompts, sampling, list(range(first_seed, first_seed + len(lengths))))


UNEQUAL = [6, 1, 13, 4, 9]
ALIKE = [5] * 20
PENALTY = 1.8
RESERVED = tuple(range(20, 70))
REQUESTS = {
    "greedy": Request.of(UNEQUAL, GREEDY),
    "greedy by top-k": Request.of(UNEQUAL, replace(DRAWN, top_k=1, ignore_eos=True, max_completion_length=16)),
    "one prompt": Request.of(UNEQUAL[:1], GREEDY),
    "no prompt": Request.of([], GREEDY),
    "one token": Request.of(UNEQUAL, replace(GREEDY, max_completion_length=1)),
    "drawn": Request.of(ALIKE, DRAWN),
    "drawn by other seeds": Request.of(ALIKE, DRAWN, first_seed=100),
    "drawn in another batch": Request.of(ALIKE[:7], DRAWN),
    "EOS ignored": Request.of(ALIKE, replace(DRAWN, ignore_eos=True)),
    "stop tokens": Request.of(ALIKE, replace(DRAWN, stop_token_ids=(17, 40, 41, 42, 43), ignore_eos=True)),
    "end of a turn": Request.of(
        ALIKE, replace(DRAWN, stop_token_ids=(find_end_of_turn(tiny_tokenizer()),), ignore_eos=True)
    ),
    "stop strings": Request.of(ALIKE, replace(DRAWN, stop=("1 w", "w3", "<|"), ignore_eos=True)),
    "few ids": Request.of(ALIKE, replace(DRAWN, vocab_size=40, ignore_eos=True)),
    "few ids, greedy": Request.of(ALIKE, replace(GREEDY, vocab_size=40)),
    "reserved ids": Request.of(ALIKE, replace(DRAWN, reserved_ids=RESERVED, ignore_eos=True)),
    "reserved ids, greedy": Request.of(ALIKE, replace(GREEDY, reserved_ids=RESERVED)),
    "reserved ids, filtered": Request.of(ALIKE, replace(DRAWN, reserved_ids=RESERVED, top_k=3, top_p=0.5)),
    "penalized, greedy": Request.of(UNEQUAL, replace(GREEDY, repetition_penalty=PENALTY)),
    "penalized, greedy by top-k": Request.of(
        UNEQUAL, replace(DRAWN, top_k=1, ignore_eos=True, max_completion_length=16, repetition_penalty=PENALTY)
    ),
    "penalized": Request.of(ALIKE, replace(DRAWN, repetition_penalty=PENALTY, ignore_eos=True)),
    "rewarded, few ids": Request.of(ALIKE, replace(DRAWN, repetition_penalty=0.5, vocab_size=40, ignore_eos=True)),
    "min-p": Request.of(ALIKE, replace(DRAWN, temperature=1.5, min_p=0.3, ignore_eos=True)),
    "filtered": Request.of(ALIKE, replace(DRAWN, temperature=0.7, top_k=5, top_p=0.8)),
}
GREEDY_AND_DRAWN = ("greedy", "drawn", "filtered", "EOS ignored")
WRONG = {
    "2 prompts and 1 seeds": Request([[5], [6]], GREEDY, [0]),
    "prompt 1 is empty": Request([[5], []], GREEDY, [0, 1]),
    "prompt 0 has the token id 99; allowed are 0 to 98": Request([[5, 99]], GREEDY, [0]),
}


def run_requests(engine: RolloutEngine, named_tensors=()) -> dict[str, list[Completion] | str]:
    """Return the engine's completions for all requests, and its messages for wrong ones."""
    results = {}
    with engine.resident():
        engine.load_weights(named_tensors, version=VERSION)
        for name, request in REQUESTS.items():
            results[name] = engine.generate(request.prompts, request.sampling, request.seeds)
        for name, request in WRONG.items():
            try:
                results[name] = engine.generate(request.prompts, request.sampling, request.seeds)
            except ValueError as error:
                results[name] = str(error)
    return results


@functools.cache
def transformers_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_greedy(path, prompts: list[list[int]], length: int, **options) -> list[list[int]]:
    """`length` tokens a prompt, by transformers' own `generate`, whether or not an EOS is among them."""
    model = transformers_model(path)
    model.generation_config.eos_token_id = None
    inputs = (torch.tensor([prompt]) for prompt in prompts)
    outputs = (model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0, **options) for ids in inputs)
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


@torch.no_grad()
def transformers_log_probs(path, prompt: list[int], token_ids: list[int]) -> list[float]:
    """Of each of `token_ids`, after the prompt and those before it."""
    logits = transformers_model(path)(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


class RolloutEngineContract:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls) -> dict[str, list[Completion] | str]:
        raise NotImplementedError("an engine's tests define it")

    @pytest.mark.parametrize("name", ["greedy", "greedy by top-k"])
    def test_greedy_tokens_are_those_of_transformers(self, results, name):
        request = REQUESTS[name]
        assert tokens_of(results[name]) == transformers_greedy(CHECKPOINT(), request.prompts, 16)

    @pytest.mark.parametrize("name", ["penalized, greedy", "penalized, greedy by top-k"])
    def test_a_repetition_penalty_is_that_of_transformers(self, results, name):
        expected = transformers_greedy(CHECKPOINT(), REQUESTS[name].prompts, 16, repetition_penalty=PENALTY)
        assert tokens_of(results[name]) == expected != tokens_of(results["greedy"])

    def test_min_p_leaves_tokens_by_their_share_of_the_largest_probability(self, results):
        """At the temperature that they are drawn with."""
        sampling = REQUESTS["min-p"].sampling
        shares = []
        for prompt, completion in zip(REQUESTS["min-p"].prompts, results["min-p"], strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = transformers_model(CHECKPOINT())(ids).logits[0, len(prompt) - 1 : -1].double()
            drawn = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            shares += ((drawn - logits.amax(-1)) / sampling.temperature).exp().tolist()
        assert sampling.min_p * 0.999 < min(shares) < 0.6

    def test_one_prompt_or_none_are_a_batch_too(self, results):
        assert tokens_of(results["one prompt"]) == tokens_of(results["greedy"])[:1]
        assert results["no prompt"] == []

    def test_a_completion_may_have_one_token(self, results):
        assert tokens_of(results["one token"]) == [tokens[:1] for tokens in tokens_of(results["greedy"])]
        assert {completion.finish_reason for completion in results["one token"]} == {"length"}

    @pytest.mark.parametrize(
        "name", ["greedy", "drawn", "filtered", "EOS ignored", "reserved ids", "penalized", "min-p"]
    )
    def test_log_probs_are_those_of_the_untempered_model(self, results, name):
        for prompt, completion in zip(REQUESTS[name].prompts, results[name], strict=True):
            expected = transformers_log_probs(CHECKPOINT(), prompt, completion.token_ids)
            assert completion.log_probs == pytest.approx(expected, abs=1e-4)

    def test_the_same_seeds_give_the_same_tokens_whatever_else_is_in_the_batch(self, results):
        assert tokens_of(results["drawn in another batch"]) == tokens_of(results["drawn"])[:7]

    def test_other_seeds_give_other_tokens(self, results):
        pairs = zip(tokens_of(results["drawn by other seeds"]), tokens_of(results["drawn"]), strict=True)
        assert all(other != drawn for other, drawn in pairs)

    def test_an_eos_ends_a_completion_and_is_its_last_token(self, results):
        stopped = [c for c in results["drawn"] if c.finish_reason == "stop"]
        assert stopped and len(stopped) < len(results["drawn"])
        for completion in results["drawn"]:
            assert EOS not in completion.token_ids[:-1]
            assert (completion.token_ids[-1] == EOS) == (completion.finish_reason == "stop")
            assert completion.finish_reason == "stop" or len(completion.token_ids) == DRAWN.max_completion_length

    def test_an_ignored_eos_is_a_token_like_any_other(self, results):
        """And what came before it is what comes where it counts."""
        assert any(EOS in tokens[:-1] for tokens in tokens_of(results["EOS ignored"]))
        for going_on, ended in zip(results["EOS ignored"], results["drawn"], strict=True):
            assert len(going_on.token_ids) == DRAWN.max_completion_length and going_on.finish_reason == "length"
            assert going_on.token_ids[: len(ended.token_ids)] == ended.token_ids

    def test_stop_tokens_end_a_completion(self, results):
        stops = set(REQUESTS["stop tokens"].sampling.stop_token_ids)
        assert any(completion.finish_reason == "stop" for completion in results["stop tokens"])
        for completion in results["stop tokens"]:
            assert not stops & set(completion.token_ids[:-1])
            assert (completion.token_ids[-1] in stops) == (completion.finish_reason == "stop")

    def test_a_base_student_stops_at_the_end_of_a_turn_of_its_template(self, results):
        """As if it were its EOS, with the token in the completion."""
        assert tokens_of(results["end of a turn"]) == tokens_of(results["drawn"])
        assert [one.finish_reason for one in results["end of a turn"]] == [
            one.finish_reason for one in results["drawn"]
        ]

    def test_stop_strings_end_a_completion_with_the_token_that_completes_them(self, results):
        """Also within a token, over two of them, and in a special token; what came before is what comes without."""
        stops = REQUESTS["stop strings"].sampling.stop
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT())
        ends = set()
        for going_on, ended in zip(results["EOS ignored"], results["stop strings"], strict=True):
            texts = [tokenizer.decode(going_on.token_ids[: i + 1]) for i in range(len(going_on.token_ids))]
            found = [[stop for stop in stops if stop in text] for text in texts]
            length = next((i + 1 for i, hits in enumerate(found) if hits), len(texts))
            assert ended.token_ids == going_on.token_ids[:length]
            assert ended.finish_reason == ("stop" if found[length - 1] else "length")
            ends.update(found[length - 1])
        assert ends == set(stops)

    @pytest.mark.parametrize("name", ["few ids", "few ids, greedy", "rewarded, few ids"])
    def test_ids_that_other_models_lack_are_never_drawn(self, results, name):
        """But they may be in the prompts, which the model reads, and whose ids a penalty below 1 makes likely."""
        free = "greedy" if name == "few ids, greedy" else "EOS ignored"
        assert any(token >= 40 for tokens in tokens_of(results[free]) for token in tokens)
        drawn = {token for tokens in tokens_of(results[name]) for token in tokens}
        assert max(drawn) < 40 and len(drawn) > 5

    @pytest.mark.parametrize("name", ["reserved ids", "reserved ids, greedy", "reserved ids, filtered"])
    def test_reserved_ids_are_never_drawn(self, results, name):
        """Filters count the tokens that are left: with top-k, as many may be drawn as without reserved ids."""
        free = "greedy" if name == "reserved ids, greedy" else "drawn"
        assert any(token in RESERVED for tokens in tokens_of(results[free]) for token in tokens)
        drawn = {token for tokens in tokens_of(results[name]) for token in tokens}
        assert not drawn.intersection(RESERVED) and len(drawn) > 3

    def test_filters_leave_only_likely_tokens(self, results):
        """No token is drawn that has 5 likelier ones."""
        for prompt, completion in zip(REQUESTS["filtered"].prompts, results["filtered"], strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = transformers_model(CHECKPOINT())(ids).logits[0, len(prompt) - 1 : -1]
            drawn = logits.gather(1, torch.tensor(completion.token_ids)[:, None])
            assert ((logits > drawn + 1e-4).sum(-1) < 5).all()

    def test_every_completion_has_the_version_of_the_weights(self, results):
        completions = [completion for name in REQUESTS for completion in results[name]]
        assert {completion.version for completion in completions} == {VERSION}

    def test_every_token_has_a_log_prob(self, results):
        for name in REQUESTS:
            for completion in results[name]:
                assert len(completion.log_probs) == len(completion.token_ids) > 0
                assert all(log_prob <= 0 for log_prob in completion.log_probs)

    @pytest.mark.parametrize("message", WRONG)
    def test_wrong_prompts_are_refused(self, results, message):
        assert message in results[message]
