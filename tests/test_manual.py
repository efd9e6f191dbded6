"""What the manual and the README show is what the commands print."""

import ast
import re
import subprocess

import pytest
from environments import PROJECT
from sandbox import AVOCADO, finish, start

DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.rst", *sorted(DOCS.glob("*.rst"))]
HOME = "/home/user1"

pytestmark = pytest.mark.skipif(AVOCADO < 105, reason="the manual shows the newest Avocado")


def blocks(page):
    """The code blocks of a page: pairs of language and text."""
    pattern = r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)"
    for match in re.finditer(pattern, page.read_text() + "\n", re.MULTILINE):
        lines = match[3].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line)
        yield match[2], "\n".join(line[indent:] for line in lines)


def commands(block):
    """The commands of a block, each with what it prints."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def words(text):
    """A text in one line: how far columns are apart depends on what else is installed."""
    return " ".join(text.split())


def has_commands(page):
    return any(language == "console" for language, _ in blocks(page))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if has_commands(page)], ids=lambda page: page.name
)
def test_commands(sandbox, page):
    sandbox.configure("")
    done = 0
    for language, block in blocks(page):
        block = block.replace(HOME, str(sandbox.home))
        if language == "ini":
            with sandbox.config.open("a") as config:
                config.write(f"{block}\n")
        elif language == "console":
            for command, printed in commands(block):
                shown = subprocess.run(
                    ["bash", "-c", command],
                    check=False,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=sandbox.environment,
                ).stdout
                assert words(shown) == words(printed), command
                done += 1
    assert done


def test_message_of_a_job_that_is_refused(sandbox):
    test, other = sandbox.vt_test("holder"), sandbox.vt_test("other")
    job = start(sandbox, test)
    _, text = finish(sandbox.run(other))
    test.end()
    finish(job)
    message = text[text.index("Avocado job failed") :]
    shown = 0
    for page in PAGES:
        for _, block in blocks(page):
            if block.startswith("Avocado job failed") and "job id" in block:
                pattern = words(block)
                for line, placeholder in re.findall(r"(file|PID|user|job id|since): +(.*)", block):
                    told = re.search(rf"{line}: +(.*)", message)[1]
                    pattern = pattern.replace(f"{line}: {placeholder}", f"{line}: {told}")
                assert words(pattern) == words(message), page
                shown += 1
    # In the README and in the manual.
    assert shown == 2


def messages():
    """The texts that users can read, as patterns."""
    for path in (PROJECT / "avocado_vt_joblock").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if called.startswith("Lock") or called in (
                    "TimeoutSettingError",
                    "warning",
                    "info",
                ):
                    yield text_pattern(node.args[0])


def text_pattern(node):
    """What a literal, with placeholders of whichever kind, can become."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(part.value if isinstance(part, ast.Constant) else "%s" for part in parts)
    # What is put together elsewhere is found there.
    return re.sub(r"%[sdg]", r".{1,300}?", re.escape(words(text)).replace("%s%s", "%s"))


def test_every_message_is_in_the_manual():
    manual = words(" ".join(text for _, text in blocks(DOCS / "messages.rst")))
    patterns = [pattern for pattern in messages() if len(pattern) > 40]
    assert len(patterns) > 15
    missing = [pattern for pattern in patterns if not re.search(pattern, manual)]
    assert missing == []
