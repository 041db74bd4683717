"""Our rendering of chat templates equals transformers' own."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from learner.ledger.template import ChatTemplate

QWEN_LIKE = """
{%- if tools %}
    {{- 'tools' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if loop.first and messages[0].role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
BLOCKS = """{{ bos_token }}
    {% for m in messages %}
        {% if m.role == 'system' %}
            {% continue %}
        {% endif %}
        [{{ m | tojson }}]
        {% generation %}{{ m.content | trim }}{% endgeneration %}
    {% endfor %}
{{ strftime_now('%Y') }} {{ eos_token }} {{ unk_token }} {{ {'b': 1, 'a': '<é>'} | tojson(indent=2, sort_keys=true) }}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " What is 1+1? <b> \n"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("text", [QWEN_LIKE, BLOCKS])
def test_rendering_equals_transformers(text: str, kwargs: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), bos_token="<s>", eos_token="</s>"
    )
    values: dict[str, Any] = {"add_generation_prompt": True, **kwargs}
    expected = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **values)
    template = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(messages, kwargs) == expected


def test_a_model_directory_gives_the_token_ids_that_transformers_gives(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from learner.ledger.model import ModelDirectory

    model = ModelDirectory(model_dir)
    expected = AutoTokenizer.from_pretrained(model_dir)
    for messages in CHATS:
        text = model.render(messages, {})
        ids = expected.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert model.encode([text], add_special_tokens=False) == [ids]


def test_a_template_may_refuse_and_may_not_reach_python() -> None:
    with pytest.raises(jinja2.TemplateError, match="ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}", {}).render([], {})
    with pytest.raises(jinja2.TemplateError, match="no"):
        ChatTemplate("{{ raise_exception('no') }}", {}).render([], {})
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", {}).render([], {})
