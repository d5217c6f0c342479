"""The compiler for chat templates that strangers wrote: jinja without attribute walks, files or endless work.

A model folder brings its chat template along, and rendering one is running a small program. `jinja2`'s own sandbox
keeps it away from Python's insides; it does not keep it from looping for a year or from building a string that fills
the memory. Here every step is counted, every value is measured before it is made, and what chat templates have no use
for is not there: a template may write text, and that is all.

- Attributes: only the harmless methods of strings, dictionaries and lists, and those of `loop` and `namespace`.
- Size: a value, and all that is written, has a limit; `*`, `+`, `~`, `%`, literals, calls and filters look ahead.
- Time: loops, macros, calls and filters take steps off one budget, and look at the clock.
- Nothing is computed while compiling, where jinja2 would fold constants such as `'a' * 10 ** 10`.

Templates get what `transformers` gives them (`raise_exception`, `strftime_now`, a plain `tojson`, loop controls,
`{% generation %}` blocks), without depending on its private functions. They do not get `include`, `import`, `lipsum`,
or filters that nobody's chat template uses and that can blow text up (`center`, `format`, `wordwrap`, ...).
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from polymodal.errors import ConfigError
from polymodal.safety import jinja_limits as limits
from polymodal.safety.jinja_limits import UnsafeTemplateError

MAX_SOURCE = 128 * 1024  # characters of a template; the longest published ones have about 30,000
MAX_NODES = 30_000  # of a template's syntax tree
# Of one rendering: rounds of loops, calls and filters; characters and entries that are handled; processor time.
MAX_STEPS = 200_000
MAX_WORK = 64_000_000
MAX_SECONDS = 5.0
STRING_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split splitlines startswith strip swapcase title upper
"""
FILTERS = """
    abs count d default dictsort first float groupby int items last length list map max min reject rejectattr reverse
    round select selectattr sort unique
"""
# Those that write their arguments out as text, which is therefore measured before.
TEXT_FILTERS = """
    capitalize e escape forceescape indent join lower replace safe string striptags title tojson trim truncate upper
    urlencode wordcount
"""
_METHODS, _TEXT = frozenset(STRING_METHODS.split()), frozenset(TEXT_FILTERS.split())


class _Budget:
    """What one rendering may still do."""

    def __init__(self, share: float) -> None:
        self.steps = int(MAX_STEPS * share)
        self.work = int(MAX_WORK * share)
        self.until = time.thread_time() + MAX_SECONDS * share

    def step(self, work: int = 0) -> None:
        self.steps -= 1
        self.work -= work
        # The clock is dear next to a step, and no step takes longer than some milliseconds.
        if self.steps < 0 or (self.steps % 64 == 0 and time.thread_time() > self.until):
            raise UnsafeTemplateError("it loops or calls too often; a chat template is done within moments")
        if self.work < 0:
            raise UnsafeTemplateError("it writes or moves too much text")


class _GenerationBlock(jinja2.ext.Extension):
    """Let `{% generation %}...{% endgeneration %}` through; the mask here does not depend on it."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]  # jinja2 declares it on instances

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that counts."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_written,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        self._local = threading.local()
        allowed = {name: self.filters[name] for name in (FILTERS + TEXT_FILTERS).split()} | limits.CAREFUL_FILTERS
        self.filters = {name: _guarded(name, function, self) for name, function in allowed.items()}
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        self.globals |= {"raise_exception": limits.raise_exception, "strftime_now": limits.strftime_now}

    @contextmanager
    def budgeted(self, share: float) -> Iterator[None]:
        """While active, this thread's rendering has a budget; a rendering inside a rendering shares it."""
        outer = getattr(self._local, "budget", None)
        self._local.budget = outer or _Budget(share)
        try:
            yield
        finally:
            self._local.budget = outer

    @property
    def budget(self) -> _Budget:
        budget: _Budget = self._local.budget
        return budget

    def tick(self, written: int) -> bool:
        """Called in every round of a loop and in every macro, with the characters that stand there as they are."""
        self.budget.step(written)
        return True

    def bounded(self, value: Any) -> Any:
        """A list, tuple or dictionary that the template wrote down."""
        self.budget.step(limits.measure(value))
        return value

    def joined(self, *parts: Any) -> str:
        """What `~` does."""
        self.budget.step(limits.measure(parts))
        return "".join(map(str, parts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have this attribute; see the top of this file."""
        if isinstance(obj, str):
            return attr in _METHODS
        if isinstance(obj, dict):
            return attr in ("items", "keys", "values", "get")
        if isinstance(obj, list | tuple):
            return attr in ("index", "count")
        return isinstance(obj, LoopContext | Namespace | Macro) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Look ahead at what an operator will make, then do it."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # by far the most frequent
            self.budget.step(limits.fits(len(left) + len(right)))
            return left + right
        self.budget.step(limits.size_of_result(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Let `str.format` be called with harmless widths only."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text = str(value.__self__)

        def wrapper(*args: Any, **kwargs: Any) -> str:
            limits.format_fits(text, text.count("{"), (args, kwargs))
            return inner(*args, **kwargs)

        return wrapper

    # Named as in jinja2, so that a template's keyword arguments cannot meet them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something from a template."""
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                args = tuple(limits.listed(argument) for argument in args)
                limits.join_fits(owner, *args[:1])
            elif __obj.__name__ == "replace":
                limits.replace_fits(owner, *args[:2])
        __self.budget.step(len(owner) if isinstance(owner, str) else 0)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str) or __obj in (dict, Namespace):
            __self.budget.step(limits.measure(result))
        return result


@lru_cache(maxsize=8)  # a folder's template is looked over, tried and then used
def compile_template(source: str, share: float = 1.0) -> Callable[..., str]:
    """Compile a chat template in the sandbox; each rendering gets a share of the usual budget."""
    if len(source) > MAX_SOURCE:
        raise UnsafeTemplateError(
            f"chat_template: {len(source):,} characters; more than {MAX_SOURCE:,} are no chat template"
        )
    environment = _Environment()
    try:
        tree = environment.parse(source)
        _refuse_reaching_out(tree)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
            raise UnsafeTemplateError(f"chat_template: more than {MAX_NODES:,} expressions")
        tree = _Counted().visit(tree)
        tree.set_environment(environment)
        code = environment.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat_template: line {error.lineno} is not valid jinja: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise UnsafeTemplateError(f"chat_template: nested too deep to be compiled ({type(error).__name__})") from None
    template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def render(**variables: Any) -> str:
        with environment.budgeted(share):
            try:
                environment.budget.step(len(source))
                return template.render(**variables)
            except UnsafeTemplateError as error:
                raise UnsafeTemplateError(f"chat_template: {error}") from None
            except (RecursionError, MemoryError, OverflowError) as error:
                raise UnsafeTemplateError(f"chat_template: {type(error).__name__}: {error}") from None
            except (ArithmeticError, LookupError) as error:
                raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None

    return render


class _Counted(NodeTransformer):
    """Let loops and macros count their rounds, and values be measured where they are written down."""

    def _counting(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_tick(node, _data_in(node.body)), lineno=node.lineno), *node.body]
        return node

    visit_Macro = visit_CallBlock = _counting

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._counting(node)
        if node.test is not None:
            node.test = nodes.And(_tick(node, 0), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("joined", list(node.nodes), node)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._bounded(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._bounded(node, [pair.value for pair in node.items])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._bounded(node, node.items) if node.ctx == "load" else node

    def _bounded(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Expr:
        plain = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        return node if plain else _call("bounded", [node], node)


def _call(name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(function, args, [], None, None, lineno=at.lineno)


def _tick(at: nodes.Node, written: int) -> nodes.Expr:
    return _call("tick", [nodes.Const(written)], at)


def _data_in(body: Iterable[nodes.Node]) -> int:
    """Characters of plain text in the body of a loop; an inner loop's are its own."""
    total = 0
    for node in body:
        if isinstance(node, nodes.TemplateData):
            total += len(node.data)
        elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            total += _data_in(node.iter_child_nodes())
    return total


def _refuse_reaching_out(tree: nodes.Template) -> None:
    """Raise where a template names a file to include, or an attribute of Python's insides."""
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise UnsafeTemplateError(f"chat_template: line {node.lineno} asks for another file ({type(node).__name__})")
    for named in tree.find_all((nodes.Getattr, nodes.Const)):
        name = getattr(named, "attr", None) or getattr(named, "value", None)
        if isinstance(name, str) and re.fullmatch(r"__\w+__", name):
            raise UnsafeTemplateError(f"chat_template: line {named.lineno} asks for Python's own attribute {name!r}")


def _guarded(name: str, function: Callable[..., Any], environment: _Environment) -> Callable[..., Any]:
    """A filter that takes a step, and whose text is measured before and after."""

    @wraps(function)  # keeps the mark that says what jinja2 passes first
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if name in ("indent", "truncate", "round", "tojson") and any(
            isinstance(value, int) and abs(value) > limits.MAX_WIDTH for value in (*args[1:], *kwargs.values())
        ):
            raise UnsafeTemplateError(f"filter {name!r} is asked for more than {limits.MAX_WIDTH}")
        environment.budget.step(limits.measure((args, kwargs)) if name in _TEXT else 0)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            environment.budget.step(limits.measure(result))
        return result

    return guarded


@jinja2.pass_context
def _written(context: Context, value: Any) -> Any:
    """What is written out. Asking for the context keeps jinja2 from writing constants while it compiles."""
    environment: Any = context.environment
    environment.budget.step(limits.measure(value))
    return value
