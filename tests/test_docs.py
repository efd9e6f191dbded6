"""What the manual and the README show is what is printed, and what they say to do works."""

import ast
import re
import subprocess

import pytest
from environments import PROJECT
from sandbox import AVOCADO, FAILURE, assert_refused, finish

DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.rst", *sorted(DOCS.glob("*.rst"))]
PACKAGE = PROJECT / "avocado_vt_joblock"
HOME = "/home/user1"

needs_newest = pytest.mark.skipif(AVOCADO < 105, reason="the manual shows the newest Avocado")


def blocks(page):
    """The code blocks of a page: pairs of language and text."""
    pattern = r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)"
    for match in re.finditer(pattern, page.read_text() + "\n", re.MULTILINE):
        lines = match[3].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line)
        yield match[2], "\n".join(line[indent:] for line in lines)


def words(text):
    """A text in one line: how far columns are apart depends on what else is installed."""
    return " ".join(text.split())


def pages_with(language):
    return [page for page in PAGES if any(found == language for found, _ in blocks(page))]


@needs_newest
@pytest.mark.parametrize("page", pages_with("console"), ids=lambda page: page.name)
def test_commands_print_what_is_shown(sandbox, page):
    """With the lines of config files that the page shows before them."""
    sandbox.configure("")
    for language, block in blocks(page):
        block = block.replace(HOME, str(sandbox.home))
        if language == "ini":
            with sandbox.config.open("a") as config:
                config.write(f"{block}\n")
        elif language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, printed = part.partition("\n")
                done = subprocess.run(
                    ["bash", "-c", command],
                    check=False,
                    capture_output=True,
                    text=True,
                    env=sandbox.environment,
                )
                assert words(done.stdout) == words(printed), done


# Tests are given as arguments: what needs something else of the machine cannot be run here.
SCRIPTS = [
    (language, block)
    for page in PAGES
    for language, block in blocks(page)
    if language in ("sh", "bash") and '"$@"' in block
]


def run_script(sandbox, shell, script, test):
    command = [shell, "-c", script, shell, "--disable-sysinfo", test.recipe]
    return finish(sandbox.popen(*command))


@needs_newest
@pytest.mark.parametrize(("shell", "script"), SCRIPTS)
def test_scripts_keep_the_exit_code(sandbox, shell, script):
    for outcome, expected in (("pass", 0), ("fail", 1)):
        test = sandbox.vt_test(outcome, outcome=outcome)
        test.end()
        code, text = run_script(sandbox, shell, script, test)
        assert code == expected, text
        assert test.has_begun
        assert "No test has run" not in text
    # A lock that nobody can judge: a job is refused then, whether it would wait or not.
    (sandbox.lock_dir / f"avocado-vt-joblock-{40 * '0'}-0-00000000.pid").touch()
    test = sandbox.vt_test("refused")
    code, text = run_script(sandbox, shell, script, test)
    assert code == 2, text
    assert FAILURE in text
    assert not test.has_begun
    assert ("No test has run" in text) == ("No test has run" in script)


def test_there_are_scripts():
    assert {shell for shell, _ in SCRIPTS} == {"sh", "bash"}


@needs_newest
def test_message_of_a_job_that_is_refused(sandbox, holder):
    test = sandbox.vt_test("refused")
    text = assert_refused(sandbox.run(test), test)
    # Other plugins tell where they have put the results.
    message = re.search("Avocado job failed.*?(?=\n\n|\nJOB )", text, re.DOTALL)[0]
    shown = [
        block
        for page in PAGES
        for _, block in blocks(page)
        if block.startswith("Avocado job failed") and "job id" in block
    ]
    # In the README and in the manual.
    assert len(shown) == 2
    for block in shown:
        same = [
            re.sub("(file|PID|user|job id|since): +.*", r"\1", each) for each in (block, message)
        ]
        assert words(same[0]) == words(same[1])


def literals(path):
    """The texts in ``messages.py``, or of exceptions elsewhere, with {} for what differs."""
    tree = ast.parse(path.read_text())
    roots = [tree]
    if path.name != "messages.py":
        roots = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    nodes = [node for root in roots for node in ast.walk(root)]
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
    texts = [words(text) for path in sorted(PACKAGE.glob("*.py")) for text in literals(path)]
    # Not names, formats of a time, and what stands between the parts of a text.
    texts = [text for text in texts if re.search("[A-Za-z]{4}", text) and " " in text]
    assert len(texts) > 40
    missing = []
    for text in texts:
        fixed = [re.escape(part).replace(r"\ ", r"\s*") for part in re.split(r"\{[^}]*\}", text)]
        if not re.search(".{1,60}?".join(part for part in fixed if part), manual):
            missing.append(text)
    assert missing == []
