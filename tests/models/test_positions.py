"""A text at a model's limit is answered, a longer one refused with the limit, for every architecture."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import pytest

torch = pytest.importorskip("torch")

import transformers

from serving_kit.models import positions
from tests.support_models import tiny, tokenizer

Serve = Callable[..., Any]
DECLARED = 40
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": DECLARED,
}
# What a config has beside that, and how many of the declared positions can be used.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "Bert": ({}, DECLARED),
    "Electra": ({"embedding_size": 32}, DECLARED),
    "Albert": ({"embedding_size": 32}, DECLARED),
    "DistilBert": ({"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}, DECLARED),
    "MegatronBert": ({}, DECLARED),
    "Roberta": ({"pad_token_id": 1}, DECLARED - 2),
    "XLMRoberta": ({"pad_token_id": 1}, DECLARED - 2),
    "XLMRobertaXL": ({"pad_token_id": 1}, DECLARED - 2),
    "RobertaPreLayerNorm": ({"pad_token_id": 1}, DECLARED - 2),
    "Camembert": ({"pad_token_id": 1}, DECLARED - 2),
    "Data2VecText": ({"pad_token_id": 1}, DECLARED - 2),
    "MPNet": ({"pad_token_id": 1}, DECLARED - 2),
    "IBert": ({"pad_token_id": 1}, DECLARED - 2),
    "Longformer": ({"pad_token_id": 1, "attention_window": [8]}, DECLARED - 2),
    "Esm": ({"pad_token_id": 3, "mask_token_id": 4, "position_embedding_type": "absolute"}, DECLARED - 4),
    "Bart": ({}, DECLARED),
    "OPT": ({"ffn_dim": 32, "word_embed_proj_dim": 32}, DECLARED),
    "GPT2": ({"n_positions": DECLARED, "n_embd": 32, "n_layer": 1, "n_head": 2}, DECLARED),
    "ModernBert": ({"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102}, DECLARED),
    "DebertaV2": ({"position_biased_input": False, "relative_attention": True}, DECLARED),
}


@cache
def words() -> Any:
    """A tokenizer that knows of no limit, as those of many fine-tuned models."""
    own = tokenizer()
    own.model_max_length = int(1e30)
    own.model_input_names = ["input_ids", "attention_mask"]
    return own


def encoder(family: str) -> Any:
    """A feature-extraction pipeline of one architecture with random weights."""
    torch.manual_seed(1)
    kind = getattr(transformers, f"{family}Config")
    more, _ = FAMILIES[family]
    common = {name: value for name, value in SMALL.items() if family not in ("GPT2", "DistilBert")}
    if family == "DistilBert":
        common = {"max_position_embeddings": DECLARED}
    model = transformers.AutoModel.from_config(kind(vocab_size=len(words()), **{**common, **more})).eval()
    return transformers.pipeline("feature-extraction", model=model, tokenizer=words(), device="cpu")


def text_of(tokens: int) -> str:
    return " ".join(["house"] * (tokens - 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_at_the_limit(serve: Serve, family: str) -> None:
    """One token more is refused."""
    _, limit = FAMILIES[family]
    pipe = encoder(family)
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    answer = httpx.post(server.url, content=text_of(limit), timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()[0]) == limit
    for tokens in (limit + 1, limit + 2, 5 * limit):
        refused = httpx.post(server.url, content=text_of(tokens), timeout=60)
        assert refused.status_code == 422
        assert f"{tokens} tokens; this model takes {limit} at most" in refused.json()["error"]
    assert server.stats()["requests"]["failed"] == 0


@pytest.mark.parametrize("family", [name for name, (_, limit) in FAMILIES.items() if limit < DECLARED])
def test_limits_are_the_models_own(family: str) -> None:
    pipe, (_, limit) = encoder(family), FAMILIES[family]
    pipe(text_of(limit))
    with pytest.raises((IndexError, RuntimeError), match=r"index .*out of (range|bounds)"):
        pipe(text_of(limit + 1))


def test_config_with_too_many_positions(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served up to the length that the model answers."""
    monkeypatch.setattr(positions, "TRIAL_S", 60.0)  # however slow this machine is
    pipe = encoder("Bert")
    pipe.model.embeddings.position_embeddings = torch.nn.Embedding(20, 32)
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    assert httpx.post(server.url, content=text_of(20), timeout=60).status_code == 200
    refused = httpx.post(server.url, content=text_of(21), timeout=60)
    assert refused.status_code == 422
    assert "this model takes 20 at most" in refused.json()["error"]


def test_no_positions_no_limit(serve: Serve) -> None:
    config = transformers.T5Config(
        vocab_size=len(words()), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5EncoderModel(config).eval()
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=words(), device="cpu")
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    assert len(server(text_of(3000))[0]) == 3000


def test_model_that_cannot_be_tried(serve: Serve) -> None:
    """A T5 classifier needs inputs for its decoder too: the limit of the tokenizer holds."""
    config = transformers.T5Config(
        vocab_size=len(words()),
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        eos_token_id=words().sep_token_id,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForSequenceClassification(config).eval()
    own = copy.deepcopy(words())
    own.model_max_length = 64
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=own, device="cpu")
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    assert httpx.post(server.url, content=text_of(64), timeout=60).status_code == 200
    assert "takes 64 at most" in httpx.post(server.url, content=text_of(65), timeout=60).text


def test_smaller_limit_of_the_tokenizer(serve: Serve) -> None:
    pipe = encoder("Roberta")
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.model_max_length = 16
    server = serve(pipe)
    assert httpx.post(server.url, content=text_of(16), timeout=60).status_code == 200
    assert "takes 16 at most" in httpx.post(server.url, content=text_of(17), timeout=60).text


# -- generation ----------------------------------------------------------------------------------


def generated(server: Any, text: str, **parameters: Any) -> httpx.Response:
    body = {"inputs": text, "parameters": {"do_sample": False, **parameters}}
    return httpx.post(server.url, json=body, timeout=60)


def test_default_of_new_tokens_is_lowered(serve: Serve) -> None:
    pipe = tiny("text-generation")  # 128 positions, and a default of 256 new tokens
    config = pipe.model.generation_config.to_dict()
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    for text in ("the river", text_of(100)):
        tokens = len(pipe.tokenizer(text)["input_ids"])
        answer = generated(server, text, return_full_text=False)
        assert answer.status_code == 200, answer.text
        want = pipe(text, do_sample=False, return_full_text=False, max_new_tokens=128 - tokens)
        assert answer.json() == want
    assert httpx.post(server.url, content="the river", timeout=60).status_code == 200
    assert pipe.model.generation_config.to_dict() == config


def test_given_new_tokens_are_refused(serve: Serve) -> None:
    server = serve(tiny("text-generation"), timeout_ms=60_000, drop_hopeless=False)
    assert generated(server, "the river", max_new_tokens=124).status_code == 200
    refused = generated(server, "the river", max_new_tokens=125)
    assert refused.status_code == 422
    assert "4 tokens and max_new_tokens is 125; this model takes 128" in refused.json()["error"]
    refused = generated(server, "the river", min_new_tokens=125)
    assert refused.status_code == 422
    assert "min_new_tokens is 125" in refused.json()["error"]
    refused = generated(server, text_of(128))
    assert refused.status_code == 422
    assert "128 tokens and 1 more must fit; this model takes 128" in refused.json()["error"]


def test_max_length_of_the_model(serve: Serve) -> None:
    """Each prompt counts alone. `generate` itself counts from the longest prompt of a batch."""
    pipe = copy.copy(tiny("text-generation"))
    pipe.model = copy.deepcopy(pipe.model)
    pipe.model.generation_config.max_length = 20
    texts = [text_of(tokens) for tokens in (10, 19, 12, 10)]
    want = [pipe(text, do_sample=False) for text in texts]
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    before = server.logs()
    assert server(texts, do_sample=False) == want
    refused = generated(server, text_of(20))
    assert refused.status_code == 422
    assert "20 tokens and 1 more must fit; this model takes 20" in refused.json()["error"]
    assert server.stats()["requests"]["failed"] == 0
    assert server.logs() == before, "the library had something to say"


def test_prompts_that_share_no_step(serve: Serve) -> None:
    """Each gets its own length."""
    pipe = tiny("text-generation")
    texts = [text_of(tokens) for tokens in (90, 100, 100, 120)]
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    answer = server(texts, do_sample=False, return_full_text=False)
    want = [
        pipe(text, do_sample=False, return_full_text=False, max_new_tokens=128 - tokens)
        for text, tokens in zip(texts, (90, 100, 100, 120), strict=True)
    ]
    assert answer == want
