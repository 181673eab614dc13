"""Templates see what they would in transformers, and cannot run or reach where they like."""

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer

from slora_core.text.chat_template import ChatTemplate
from slora_core.text.template_sandbox import (
    MAX_SOURCE_CHARS,
    MAX_TEXT_CHARS,
    TemplateSourceError,
    check_template,
    render_template,
)
from tests.tiny_tokenizer import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "yo"},
]
LIKE_TRANSFORMERS = [
    "{% for m in messages %}\n  {{- loop.index ~ m.role }}\n{% endfor %}\n{{ eos_token }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for m in nothing %}{% else %}none{% endfor %}{{ nothing }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for c in 'abc' %}{{ c }}{{ loop.nextitem }}{% endfor %}{% for k in messages[0] %}{{ k }}"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "{% macro shown(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ shown(m) }}"
    "{% endfor %}",
    "{% for m in messages recursive %}{{ m.role }}{% if loop.first and loop.depth == 1 %}"
    "{{ loop(messages[1:]) }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{%- set x = 1 %}{%- generation -%} {% set x = 2 %}{{ x }} {%- endgeneration -%}{{ x }}",
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ thinking }}",
    "{{ strftime_now('%Y') | length }}{{ range(3) | list }}{{ messages[::-1][0].role | upper }}",
]


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("source", LIKE_TRANSFORMERS)
def test_as_transformers_renders(hf_tokenizer, source):
    check_template(source)
    expected = hf_tokenizer.apply_chat_template(
        MESSAGES,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=True,
        thinking=False,
    )
    assert ChatTemplate(hf_tokenizer, source).render(MESSAGES, {"thinking": False}) == expected


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for m in messages %}", "is not valid Jinja in line 1: Unexpected end of template"),
        ("\n{{ messages | nosuch }}", "in line 2: No filter named 'nosuch'"),
        ("{% break %}", "'break' outside loop"),
        ("{% generation %}", "looking for the following tags: 'endgeneration'"),
        ("{{" + "(" * 5000, "is not valid Jinja: "),
        ("x" * (MAX_SOURCE_CHARS + 1), "has 65537 characters; at most 65536 are supported"),
    ],
)
def test_what_is_no_template(source, told):
    with pytest.raises(TemplateSourceError) as caught:
        check_template(source)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{{ j }}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    ],
)
def test_loops_and_calls_are_counted(source):
    with pytest.raises(SecurityError, match="more than 500000 turns"):
        render_template(source, {"messages": MESSAGES * 100})


def test_a_long_chat_is_far_from_the_bounds():
    source = (
        "{% for m in messages %}{% for o in messages[:20] %}{{ o.role[0] }}{% endfor %}"
        "{{ m.content.strip() }}{% endfor %}"
    )
    text = render_template(source, {"messages": [{"role": "user", "content": " hi "}] * 2048})
    assert text == ("u" * 20 + "hi") * 2048


def test_what_is_written_is_bounded():
    source = "{% for i in range(1000) %}{{ text }}{% endfor %}"
    with pytest.raises(SecurityError, match=f"more than {MAX_TEXT_CHARS} characters"):
        render_template(source, {"text": "x" * (MAX_TEXT_CHARS // 100)})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ self._TemplateReference__context.vars }}",
    ],
)
def test_nothing_is_reached_or_changed(source):
    with pytest.raises(SecurityError):
        render_template(source, {"messages": MESSAGES})


def test_a_template_may_raise():
    with pytest.raises(TemplateError, match="no such role"):
        render_template("{{ raise_exception('no such role') }}", {})


def test_a_template_of_several(hf_tokenizer, monkeypatch):
    templates = {"tool_use": "tools", "default": "{{ messages[1].content }}"}
    monkeypatch.setattr(hf_tokenizer, "chat_template", templates)
    assert ChatTemplate(hf_tokenizer).render(MESSAGES) == "hé"
