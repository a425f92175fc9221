"""What decoders print in C stays off the console; what anybody else prints does not."""

import os
import subprocess
import sys
import threading

from ttmray.audio.chatter import held_back

MPG123 = b"[src/libmpg123/parse.c:skip_junk():1260] error: Giving up searching valid MPEG header after 65536 bytes.\n"
XING = b"Warning: Xing stream size off by more than 1%, fuzzy seeking may be even more fuzzy than by design!\n"


def test_lines_of_decoders_go_and_others_stay(capfd):
    with held_back():
        for line in (MPG123, b"disk quota exceeded on /data\n", XING):
            os.write(2, line)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "disk quota exceeded on /data\nafter\n"


def test_threads_that_overlap_leave_the_descriptor_as_it_was(capfd):
    def decode() -> None:
        for _ in range(50):
            with held_back():
                os.write(2, XING)

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"end\n")
    assert capfd.readouterr().err == "end\n"


def test_a_damaged_mp3_says_nothing_on_the_console(tmp_path):
    (tmp_path / "bad.mp3").write_bytes(b"\xff\xfb\x90\x00" + bytes(range(256)) * 400)
    code = (
        "import sys; from ttmray.audio import io; from ttmray.errors import ClipError\n"
        "for act in (io.probe, lambda path: io.decode(path, io.AudioLimits())):\n"
        "    try: act(sys.argv[1])\n"
        "    except ClipError as error: print(error.reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.mp3")], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


def test_a_process_without_a_console_decodes_too(tmp_path):
    code = "import os; os.close(2); from ttmray.audio.chatter import held_back\nwith held_back(): print('in')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"in\n"
