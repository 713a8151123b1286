"""The dialects that the server speaks. A new one is one module and one line here.

Dialects that share a path are asked in this order; `RAW` takes whatever is left, so it comes last.
"""

from __future__ import annotations

from serving_kit.http.dialects.base import Dialect
from serving_kit.http.dialects.huggingface import HUGGING_FACE
from serving_kit.http.dialects.openai import OPENAI
from serving_kit.http.dialects.raw import RAW

DIALECTS: tuple[Dialect, ...] = (HUGGING_FACE, RAW, OPENAI)
