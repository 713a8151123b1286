"""Which models generate many sequences in one step is found by trying them."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers

from serving_kit.models.decoding_trial import make_decoder
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import tiny, tokenizer

COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 140,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 16}
WINDOW = {"sliding_window": 10}
TAKEN: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, **WINDOW},
    "Qwen2": GROUPED,
    "Qwen3": HEADED,
    "Gemma3Text": {**HEADED, **WINDOW},
    "Phi3": GROUPED,
    "Phi": {"intermediate_size": 128},
    "GPT2": {},
    "GPTNeoX": {"intermediate_size": 128},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "StableLm": GROUPED,
    "Granite": GROUPED,
}
NOT_TAKEN: dict[str, dict[str, Any]] = {
    "Bloom": {},
    "Falcon": {},
    "GPTJ": {},
    "Gemma2": {**HEADED, **WINDOW},  # its attention caps the scores
}


def pipeline_of(family: str, config: dict[str, Any]) -> Any:
    """What the trial looks at, with random weights."""
    torch.manual_seed(3)
    settings = getattr(transformers, f"{family}Config")(**{**COMMON, **config})
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")


@pytest.mark.parametrize("family", TAKEN)
def test_family_shares_steps(family: str) -> None:
    decoder, reason = make_decoder(pipeline_of(family, TAKEN[family]))
    assert decoder is not None, reason


@pytest.mark.parametrize("family", NOT_TAKEN)
def test_other_attention_runs_in_groups(family: str) -> None:
    pipe = pipeline_of(family, NOT_TAKEN[family])
    usual = pipe.model.config._attn_implementation
    decoder, reason = make_decoder(pipe)
    assert decoder is None
    assert "several sequences in one row" in reason
    assert pipe.model.config._attn_implementation == usual


def test_layout_says_so() -> None:
    layout = build_pipeline_model(tiny("text-generation")).limits.layout
    assert layout == (True, "sequences join and leave at every step")


def test_shortcuts_off_runs_in_groups() -> None:
    model = build_pipeline_model(tiny("text-generation"), shortcuts=False)
    assert (model.decoder, model.limits.layout) == (None, (False, "shortcuts=False"))


def test_pipeline_that_calls_generate_otherwise() -> None:
    """A pipeline of one's own whose forward takes no further arguments runs in groups."""

    class Own(transformers.TextGenerationPipeline):
        def _forward(self, model_inputs: Any, max_new_tokens: int = 3, do_sample: bool = False) -> Any:
            return super()._forward(model_inputs, max_new_tokens=max_new_tokens, do_sample=do_sample)

    given = tiny("text-generation")
    pipe = Own(model=given.model, tokenizer=given.tokenizer, task="text-generation", device="cpu")
    decoder, reason = make_decoder(pipe)
    assert decoder is None
    assert "TypeError" in reason
