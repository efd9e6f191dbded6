"""What the manual and the README show is printed, and what they say to do works."""

import ast
import json
import re
import subprocess
import sys

import pytest
from environments import PROJECT
from sandbox import (
    AVOCADO,
    FAILURE,
    HERE,
    assert_refused,
    finish,
    start_waiting,
)

from avocado_vt_joblock import helpers

DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.rst", *sorted(DOCS.glob("*.rst"))]
MESSAGES = (DOCS / "messages.rst").read_text()
COMMAND = (DOCS / "command.rst").read_text()
COLUMNS = 80

pytestmark = pytest.mark.skipif(
    AVOCADO < 105, reason="the manual shows the newest Avocado"
)


def blocks(page):
    """Return the code blocks of a page: pairs of language and text."""
    pattern = r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)"
    found = []
    for match in re.finditer(pattern, page.read_text() + "\n", re.MULTILINE):
        lines = match[3].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line)
        found.append((match[2], "\n".join(line[indent:] for line in lines)))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def words(text):
    """Put a text in one line: how far columns are apart depends on what else is
    installed."""
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_print_what_is_shown(sandbox, page):
    """With the lines of the config file that the page shows before them."""
    sandbox.configure("")
    for language, shown in blocks(page):
        block = shown.replace("/home/user1", str(sandbox.home))
        if language == "ini":
            sandbox.configure(f"{block}\n")
        elif language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, printed = part.partition("\n")
                shell = sandbox.popen("bash", "-c", command, stderr=subprocess.DEVNULL)
                _, text = finish(shell)
                assert words(text) == words(printed)


def test_scripts_keep_the_exit_code(sandbox):
    # Tests are given as arguments: what needs something else of the machine cannot be
    # run here.
    scripts = [block for language, block in BLOCKS if language == "sh"]
    scripts = [block for block in scripts if '"$@"' in block]
    assert len(scripts) == 2
    # A lock that nobody can judge: a job is refused then, whether it would wait or not.
    lock = sandbox.lock_dir / f"avocado-vt-joblock-{40 * '0'}-0-00000000.pid"
    for outcome, expected in (("pass", 0), ("fail", 1), ("refused", 2)):
        test = sandbox.vt_test(outcome, outcome=outcome)
        test.end()
        is_refused = outcome == "refused"
        if is_refused:
            lock.touch()
        for script in scripts:
            command = ["sh", "-c", script, "sh", "--disable-sysinfo", test.recipe]
            code, text = finish(sandbox.popen(*command))
            assert code == expected, text
            assert (FAILURE in text) == is_refused
            says_so = is_refused and "No test has run" in script
            assert ("No test has run" in text) == says_so
        assert len(test.notes()) == (0 if is_refused else 2 * len(scripts))


def test_message_of_a_job_that_is_refused(sandbox, holder):
    test = sandbox.vt_test("refused")
    text = assert_refused(sandbox.run(test), test)
    # Other plugins tell where they have put the results.
    message = re.search("Avocado job failed.*?(?=\n\n|\nJOB )", text, re.DOTALL)[0]
    begin = r"Avocado job failed[\s\S]*job id"
    shown = [block for _, block in BLOCKS if re.match(begin, block)]
    assert len(shown) == 2  # in the README and in the manual
    # What differs; and the manual is on the disk only where it was installed.
    own = r"(file|PID|user|job id|since|--vt-joblock-dir):? +(?!DIR,).*|\nMore: less .*"
    texts = {words(re.sub(own, r"\1", each)) for each in [message, *shown]}
    assert len(texts) == 1, texts


def test_demo(sandbox):
    code, text = finish(sandbox.popen(sys.executable, HERE / "demo.py"))
    assert code == 0, text


def literals(path):
    """Return the texts in a module, with {} for what differs.

    In ``messages.py`` these are all texts, elsewhere those of exceptions.
    """
    nodes = list(ast.walk(ast.parse(path.read_text())))
    if path.name not in ("messages.py", "advice.py"):
        raised = [node.exc for node in nodes if isinstance(node, ast.Raise)]
        raised = [error for error in raised if error]
        nodes = [node for exception in raised for node in ast.walk(exception)]
    # Docstrings, and the parts of what is put together.
    skipped = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            parts = [part if isinstance(part, str) else "{}" for part in parts]
            texts.append("".join(parts))
            skipped.update(node.values)
        elif isinstance(getattr(node, "value", None), str) and node not in skipped:
            texts.append(node.value)
    return texts


def test_every_message_is_in_the_manual():
    manual = words(MESSAGES.replace("``", " "))
    texts = [
        words(text)
        for path in sorted(PROJECT.glob("avocado_vt_joblock/*.py"))
        for text in literals(path)
    ]
    # Not names, formats of a time, and what stands between the parts of a text.
    texts = [text for text in texts if re.search("[A-Za-z]{4}", text) and " " in text]
    assert len(texts) > 60
    for text in texts:
        parts = re.split(r"\{[^}]*\}", text)
        fixed = [re.escape(part).replace(r"\ ", r"\s*") for part in parts]
        # What differs may be all that is known of a lock, and two processes.
        pattern = ".{0,300}?".join(part for part in fixed if part)
        assert re.search(pattern, manual), text


def test_every_message_can_be_linked_and_found_by_its_words():
    """Its section has a label, a title that is in the message, and then the message."""
    sections = re.findall(r"^(.+)\n~{3,}$", MESSAGES, re.MULTILINE)
    pattern = (
        r"^\.\. _(message-[a-z-]+):\n\n(.+)\n~{3,}\n\n"
        r"\.\. code-block:: text\n\n((?:   .*\n|\n)+)"
    )
    found = re.findall(pattern, MESSAGES, re.MULTILINE)
    assert [title for _, title, _ in found] == sections
    labels = [label for label, _, _ in found]
    assert len(set(labels)) == len(labels)
    for _, title, block in found:
        for part in title.split("..."):
            assert words(part) in words(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_fit_a_terminal(page):
    """But for what ``avocado config`` prints, and for programs."""
    for language, block in blocks(page):
        if language == "text":
            assert max(map(len, block.splitlines())) <= COLUMNS, block


def test_keys_of_json_are_those_of_the_manual(sandbox, holder):
    """They are a promise."""
    sandbox.add_to_config("timeout = 60")
    waiter, test, _ = start_waiting(sandbox, "waiter")
    file = sandbox.root / "shown.json"
    finish(sandbox.avocado("vt-joblock", "show", "--json", file))
    shown = json.loads(file.read_text())
    holder[1].end()
    assert finish(waiter)[0] == 0
    assert test.has_begun
    section = COMMAND.partition("\n.. _json:")[2].partition("\n.. _command-run:")[0]
    documented = {"": [], "   ": []}
    for indent, terms in re.findall("^( *)(``[a-z_`, ]+``)\n", section, re.MULTILINE):
        documented[indent] += re.findall("``([a-z_]+)``", terms)
    (lock,), (ticket,) = shown["locks"], shown["waiting"]
    assert list(shown) == documented[""]
    assert sorted(lock) == sorted(documented["   "])
    told = words(section)
    assert "for each ``pid``, ``command``, ``uid`` and ``user``" in told
    assert set(lock["processes"][0]) == {"pid", "command", "uid", "user"}
    assert "for each ``host``, ``pid``, ``uid``, ``user``, and ``since``" in told
    assert set(ticket) == {"host", "pid", "uid", "user", "since"}


def test_helpers_that_do_not_count_are_listed():
    text = words((DOCS / "promises.rst").read_text())
    listed = text.partition("These do not count")[2].partition("also if a shell")[0]
    assert set(re.findall("``([^`]+)``", listed)) == helpers.HELPERS


def test_options_that_avocado_takes_from_a_command_are_listed():
    listed = words(COMMAND).partition("Avocado reads")[2]
    listed = listed.partition("wherever they stand")[0]
    # To import it would load Avocado here.
    source = (PROJECT / "avocado_vt_joblock/holding.py").read_text()
    refused = source.partition("\nAVOCADO_OPTIONS = ")[2].partition("\n\n")[0]
    theirs = {*ast.literal_eval(refused), "--version", "-v"}
    assert set(re.findall("``([^`]+)``", listed)) == theirs
