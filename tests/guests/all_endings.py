"""Real guests under real avocado-vt: every other way for a job to end; it takes a while."""

import pytest
from endings import GUEST, MORE, check
from home import Contenders
from sandbox import finish


@pytest.mark.parametrize("ending", MORE, ids=lambda ending: ending.name)
def test_no_job_runs_beside_what_is_left_of_another(home, ending):
    check(home, ending)


@pytest.mark.parametrize("how", ["kill_vm = no", "keep_guest_running"])
def test_guest_left_on_purpose_keeps_nobody_waiting(home, how):
    if how == "keep_guest_running":
        home.set_up("[vt.setup]\nkeep_guest_running = True\n")
        job = home.start()
    else:
        job = home.start(kill_vm="no")
    assert Contenders(job).start_one().refused
    job.test.end()
    code, text = finish(job.avocado)
    assert code == 0, text
    assert list(home.lock_dir.iterdir()) == []
    assert job.running(GUEST)
    test = home.vt_test("next")
    test.end()
    code, text = finish(home.run(test))
    assert code == 0, text
    assert test.has_begun
