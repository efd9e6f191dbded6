"""A VT test that changes the image of its guest."""

import time

from virttest import env_process

DISK = "/machine/peripheral/image1/virtio-backend"


def run(test, params, env):
    """Write to the image, as the guest's disk does.

    :param params: ``main_vm``, the guest, which runs; ``clean_up_takes``, how many
        seconds the clean-up lasts at least, before it restores the image;
        ``clean_up_fails``,
                   ``yes`` or ``no``
    """
    vm = env.get_vm(params["main_vm"])
    vm.verify_alive()
    for command in ("write -P 0x5a 0 1M", "flush"):
        line = f'qemu-io -d {DISK} "{command}"'
        vm.monitor.cmd("human-monitor-command", {"command-line": line})
    seconds = float(params["clean_up_takes"])
    env_process.postprocess_vm_on_hook = lambda *_: time.sleep(seconds)
    if params["clean_up_fails"] == "yes":
        env_process.postprocess_vm = fail


def fail(*_):
    """Leave the guest as it is."""
    raise RuntimeError("told to fail")
