"""What the manual and the README show is what is printed, and what they say to do works."""

import ast
import re
import subprocess
import sys

import pytest
from environments import PROJECT
from sandbox import AVOCADO, FAILURE, HERE, assert_refused, finish

DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.rst", *sorted(DOCS.glob("*.rst"))]

pytestmark = pytest.mark.skipif(AVOCADO < 105, reason="the manual shows the newest Avocado")


def blocks(page):
    """The code blocks of a page: pairs of language and text."""
    pattern = r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)"
    for match in re.finditer(pattern, page.read_text() + "\n", re.MULTILINE):
        lines = match[3].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line)
        yield match[2], "\n".join(line[indent:] for line in lines)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def words(text):
    """A text in one line: how far columns are apart depends on what else is installed."""
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_print_what_is_shown(sandbox, page):
    """With the lines of config files that the page shows before them."""
    sandbox.configure("")
    for language, block in blocks(page):
        block = block.replace("/home/user1", str(sandbox.home))
        if language == "ini":
            sandbox.add_to_config(block)
        elif language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, printed = part.partition("\n")
                _, text = finish(sandbox.popen("bash", "-c", command, stderr=subprocess.DEVNULL))
                assert words(text) == words(printed)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_keep_the_exit_code(sandbox, shell):
    # Tests are given as arguments: what needs something else of the machine cannot be run here.
    scripts = [block for language, block in BLOCKS if language == shell and '"$@"' in block]
    assert scripts
    # A lock that nobody can judge: a job is refused then, whether it would wait or not.
    lock = sandbox.lock_dir / f"avocado-vt-joblock-{40 * '0'}-0-00000000.pid"
    for outcome, expected in (("pass", 0), ("fail", 1), ("refused", 2)):
        test = sandbox.vt_test(outcome, outcome=outcome)
        test.end()
        if outcome == "refused":
            lock.touch()
        for script in scripts:
            command = [shell, "-c", script, shell, "--disable-sysinfo", test.recipe]
            code, text = finish(sandbox.popen(*command))
            assert code == expected, text
            assert (FAILURE in text) == (outcome == "refused")
            assert ("No test has run" in text) == (FAILURE in text and "No test has run" in script)
        assert len(test.notes()) == (0 if outcome == "refused" else 2 * len(scripts))


def test_message_of_a_job_that_is_refused(sandbox, holder):
    test = sandbox.vt_test("refused")
    text = assert_refused(sandbox.run(test), test)
    # Other plugins tell where they have put the results.
    message = re.search("Avocado job failed.*?(?=\n\n|\nJOB )", text, re.DOTALL)[0]
    shown = [block for _, block in BLOCKS if re.match(r"Avocado job failed[\s\S]*job id", block)]
    assert len(shown) == 2  # in the README and in the manual
    own = "(file|PID|user|job id|since): +.*"
    assert len({words(re.sub(own, r"\1", text)) for text in [message, *shown]}) == 1


def test_demo(sandbox):
    code, text = finish(sandbox.popen(sys.executable, HERE / "demo.py"))
    assert code == 0, text


def literals(path):
    """The texts in ``messages.py``, or of exceptions elsewhere, with {} for what differs."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    if path.name != "messages.py":
        raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc]
        nodes = [node for exception in raised for node in ast.walk(exception)]
    # Docstrings, and the parts of what is put together.
    skipped = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            yield "".join(part if isinstance(part, str) else "{}" for part in parts)
            skipped.update(node.values)
        elif isinstance(getattr(node, "value", None), str) and node not in skipped:
            yield node.value


def test_every_message_is_in_the_manual():
    manual = words((DOCS / "messages.rst").read_text().replace("``", " "))
    texts = [
        words(text)
        for path in sorted(PROJECT.glob("avocado_vt_joblock/*.py"))
        for text in literals(path)
    ]
    # Not names, formats of a time, and what stands between the parts of a text.
    texts = [text for text in texts if re.search("[A-Za-z]{4}", text) and " " in text]
    assert len(texts) > 40
    for text in texts:
        fixed = [re.escape(part).replace(r"\ ", r"\s*") for part in re.split(r"\{[^}]*\}", text)]
        assert re.search(".{1,60}?".join(part for part in fixed if part), manual), text
