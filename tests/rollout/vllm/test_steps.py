"""A long rollout is no hang: each step of vLLM's engine is progress. Without vLLM."""

from types import SimpleNamespace

from megatron_gkd.rollout.vllm import process


def test_each_step_of_the_engine_is_progress(monkeypatch):
    counted = []
    monkeypatch.setattr(process, "note_progress", lambda: counted.append(None))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(step=lambda: ["output"]))
    process._note_each_step(llm)
    assert [llm.llm_engine.step(), llm.llm_engine.step()] == [["output"]] * 2 and len(counted) == 2
