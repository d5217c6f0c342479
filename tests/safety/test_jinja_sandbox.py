"""Chat templates of strangers: what they may do works as in transformers, what they may not do ends at once."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from polymodal.config import TemplateConfig
from polymodal.errors import ConfigError, PolymodalError
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.safety.jinja_limits import MAX_VALUE, UnsafeTemplateError
from polymodal.safety.jinja_sandbox import MAX_NODES, MAX_SOURCE, compile_template

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello <there>"},
    {"role": "assistant", "content": " Hi & bye\n"},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": [1, 2.5, None, True]}}}]

WITH_TOOLS = """
{%- macro described(tool, depth=1) -%}
  {{- '  ' * depth ~ tool.function.name ~ ': ' ~ (tool | tojson(indent=2)) | indent(2) -}}
{%- endmacro -%}
{%- if tools %}{{ '<tools>\n' }}{% for tool in tools %}{{ described(tool) }}{{ '\n' }}{% endfor %}</tools>{% endif %}
{%- set ns = namespace(last=none, kept=[]) -%}
{%- for message in messages[::-1] if message.role != 'tool' -%}
  {%- if ns.last is none and message['role'] == 'user' -%}{%- set ns.last = loop.revindex0 -%}{%- endif -%}
  {%- set ns.kept = ns.kept + [message] -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.content is string -%}{%- set text = message.content -%}
  {%- else -%}{%- set text = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
  {%- endif -%}
  {%- if loop.index0 > messages | length -%}{%- break -%}{%- endif -%}
  {{- '<|%s|>' % message.role + text.split('</think>')[-1].strip().replace('&', 'and') + ("%03d" % loop.index) -}}
  {%- generation -%}{{- message.get('name', 'nobody') | upper | trim -}}{%- endgeneration -%}
  {%- if not loop.last %}, {% endif -%}
  {%- set box = {'a': message.role, 'b': [loop.index0, ns.last]} -%}
  {{- box.items() | list | string + '{}-{:>4}'.format(box['a'], 7) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
{{- (ns.kept | map(attribute='role') | unique | sort | join('/')) ~ 3 * 4 ~ 2 ** 8 ~ [1, 2] ~ missing -}}
"""


def of_jinja(source: str, **variables: Any) -> str:
    """What jinja2's own sandbox makes of it, set up as transformers sets it up."""
    import json

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    plain = source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return environment.from_string(plain).render(**variables)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_what_templates_use_works_as_in_transformers(tools: Any) -> None:
    variables = {"messages": CONVERSATION, "tools": tools, "add_generation_prompt": True}
    text = compile_template(WITH_TOOLS)(**variables)
    assert text == of_jinja(WITH_TOOLS, **variables)
    assert "<|user|>" in text and ("<tools>" in text) == (tools is not None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_written_as_by_jinja(name: str) -> None:
    variables = {"messages": CONVERSATION, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": False}
    source = PRESETS[name].jinja
    assert compile_template(source)(**variables) == of_jinja(source, **variables, raise_exception=None)


def test_a_long_conversation_is_no_attack() -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(1000)]
    text = compile_template(WITH_TOOLS)(messages=turns, tools=TOOLS, add_generation_prompt=True)
    assert len(text) > 1_000_000


REPEAT = "{% for i in range(60) %}"
DOUBLE = "{% set ns = namespace(a=[1], b=[1], s='ab') %}"
ATTACKS = {
    "a giant loop": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that skips all": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a macro that doubles": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(0) }}",
    "exponential calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "a tilde": DOUBLE + REPEAT + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a plus": DOUBLE + REPEAT + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times a list": "{{ ([1] * 99999 * 99999) | length }}",
    "a giant power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "a width given as a value": "{{ '%*d' % (2000000000, 1) }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "a nested format": "{{ '{:>{}}'.format(1, 2000000000) }}",
    "many holes": "{{ '%s' * 1000 % (('a' * 99999,) * 1000) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "tojson": "{{ [1] | tojson(indent=10**9) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "the filter replace": "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "join of a generator": "{{ range(99999) | map('replace', '', 'b' * 999) | join('x' * 999) }}",
    "a list of a generator": "{{ range(99999) | map('string') | map('replace', '', 'b' * 999) | list | length }}",
    "a billion laughs": DOUBLE + REPEAT + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "laughing dictionaries": DOUBLE + REPEAT + "{% set ns.a = dict(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}",
    "laughing namespaces": DOUBLE + REPEAT + "{% set ns.a = namespace(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}",
    "comparing": DOUBLE + REPEAT + "{% set ns.a = [ns.a, 1, ns.a] %}{% set ns.b = [ns.b, 1, ns.b] %}{% endfor %}",
    "itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "blocks": "{% for i in range(9999) %}{% set x %}{% for j in range(9999) %}{{ 'y' * 999 }}{% endfor %}{% endset %}"
    "{% endfor %}",
    "plain text": "{% for i in range(99999) %}" + "y" * 50_000 + "{% endfor %}",
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 18 + "x" * 999 + "{% endcall %}" * 18,
    "a date": "{{ strftime_now('%2000000000Y') }}",
    "brackets": "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}",
    "dots": "{{ a" + ".a" * 20_000 + " }}",
    "blocks in blocks": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "length": "x" * (MAX_SOURCE + 1),
    "expressions": "{{ [" + "1," * MAX_NODES + "] }}",
    "Python's class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python's class as an item": "{{ ''['__class__'] }}",
    "Python's class as a filter": "{{ [''] | map(attribute='__class__') | list }}",
    "globals": "{{ namespace.__init__.__globals__ }}",
    "another file": "{% include '/etc/passwd' %}",
    "another module": "{% import 'os' as os %}{{ os }}",
    "a parent": "{% extends '/etc/passwd' %}",
}  # fmt: skip


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_attacks_end_at_once(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises(UnsafeTemplateError, match=r"^chat_template: "):
        compile_template(source)(messages=CONVERSATION)
    assert time.thread_time() - begin < 10


REFUSED = {
    "an attribute that is put together": "{{ (''['__cla' ~ 'ss__'])['x'] }}",
    "an attribute by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "changing what was given": "{{ messages.append(1) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'little') }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "tabs": "{{ '\t'.expandtabs(10**10) }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_what_is_not_there_is_refused_when_it_is_used(source: str) -> None:
    before = list(CONVERSATION)
    with pytest.raises(jinja2.TemplateError):
        compile_template(source)(messages=CONVERSATION)
    assert before == CONVERSATION


@pytest.mark.parametrize("name", ["center", "format", "wordwrap", "attr", "sum", "pprint"])
def test_filters_that_no_template_needs_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"No filter named '{name}'"):
        compile_template("{{ 'a' | " + name + "('b') }}")


@pytest.mark.parametrize("name", ["times", "times a list", "replace", "many holes"])
def test_nothing_large_is_made_to_find_out(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeTemplateError):
            compile_template(ATTACKS[name])(messages=CONVERSATION)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_VALUE
    finally:
        tracemalloc.stop()


def test_the_budget_is_one_renderings_alone() -> None:
    render = compile_template("{% for i in range(50000) %}{% endfor %}done")
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.extend(render() for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["done"] * 9


def test_a_chat_template_that_hangs_stops_its_model(byte_tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for i in range(99999) %}{% for j in range(9) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    begin = time.thread_time()
    with pytest.raises(PolymodalError, match="it loops or calls too often"):
        ChatTemplate(byte_tokenizer, TemplateConfig(chat_template=source), image_token_id=300)
    assert time.thread_time() - begin < 10
