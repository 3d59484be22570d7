"""`minke top` in front of a real cluster: one frame for a pipe, and the live view in a pseudo-terminal."""
import fcntl, os, pty, re, select, signal, struct, subprocess, tempfile, termios, time, unittest
import harness
from harness import Cluster, Streams, run, wait_until

MODEL = os.path.join(harness.ROOT, "models", "minke-shakespeare")


class Terminal:
    """`minke top` in a pseudo-terminal; what it has drawn since the last look."""

    def __init__(self, url, columns, rows, *flags):
        self.master, slave = pty.openpty()
        self.resize(columns, rows, slave)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen([harness.MINKE, "top", "--url", url, *flags], stdin=slave, stdout=slave, stderr=slave,
                                        env=dict(os.environ, LC_ALL="C.UTF-8"), start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.text = ""

    def resize(self, columns, rows, fd=None):
        fcntl.ioctl(self.master if fd is None else fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds=0.05):
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:   # closed at the other end
                break
            if not data:
                break
            self.text += data.decode("utf-8", "replace")
        return self.text

    def frames(self):
        """Frames that are whole, without colors: lists of lines."""
        whole = [part.split("\x1b[J")[0] for part in self.read().split("\x1b[H")[1:] if "\x1b[J" in part]
        return [[re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in frame.split("\r\n")] for frame in whole]

    def shows(self, what, seconds=15):
        return wait_until(lambda: any(what in line for line in (self.frames() or [[]])[-1]), seconds)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


class Top(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.keys = tempfile.NamedTemporaryFile("w", suffix=".keys")
        cls.keys.write("# ours\n\nsecret\n")
        cls.keys.flush()
        cls.key_flag = "--api-key-file=" + cls.keys.name
        cls.cluster = Cluster(MODEL, "--threads=1", "--supervise", cls.key_flag)

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()
        cls.keys.close()

    def refused(self, *arguments, expect):
        result = run("top", *arguments, timeout=20)
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertIn(expect, result.stderr)

    def load(self):
        status, _, text = self.cluster.request("POST", "/v1/completions", {"prompt": "ROMEO:", "max_tokens": 150, "ignore_eos": True},
                                               headers={"authorization": "Bearer secret"})
        self.assertEqual(status, 200, text)

    def test_what_cannot_be_is_one_line(self):
        url = ("--url", self.cluster.url)
        self.refused("--once", "--url", "http://127.0.0.1:%d" % harness.free_port(), expect="cannot reach")
        self.refused("--once", "--url", "127.0.0.1", expect="expected http://HOST:PORT")
        self.refused("--once", *url, expect="401 an API key is needed")
        self.refused("--once", *url, "--api-key-file=/nowhere", expect="/nowhere")
        self.refused("--once", *url, "--api-key-file=/dev/null", expect="expected a key of printable characters in a line, found none in /dev/null")

    def test_one_frame_for_a_pipe(self):
        self.load()
        time.sleep(2.2)   # what members say of the second that has passed
        self.load()
        for flags in (("--once",), ()):   # where the output is no terminal it is one frame anyway
            result = run("top", "--url", self.cluster.url, self.key_flag, *flags, timeout=20)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertNotIn("\x1b", result.stdout)
            self.assertRegex(result.stdout, r"(?m)^Minke minke-shakespeare  serving  epoch \d+\.\d+  leader [0-9a-f]{8} ")
            self.assertRegex(result.stdout, r"(?m)^[\d.]+ tokens/s  first [\d.]+ m?s ")
            self.assertRegex(result.stdout, r"(?m)^experts    2 ready$")
            self.assertEqual(len(re.findall(r"(?m)^  [0-9a-f]{8} ready .*rows/s .*28 units$", result.stdout)), 2)
            self.assertEqual(len(re.findall(r"(?m)^ {4}[1-7] ( +[\d.]+){2} $", result.stdout)), 7, result.stdout)   # the heat map

    def test_the_terminal_lives_is_resized_and_given_back(self):
        terminal = Terminal(self.cluster.url, 100, 30, self.key_flag)
        try:
            self.assertTrue(terminal.shows("experts    2 ready"), terminal.text)
            clocks = {frame[0][-8:] for frame in terminal.frames()}
            self.assertTrue(wait_until(lambda: len({frame[0][-8:] for frame in terminal.frames()} - clocks) >= 2, 10))
            terminal.resize(60, 12)
            self.assertTrue(wait_until(lambda: len(terminal.frames()[-1]) <= 12, 10))
            self.assertLessEqual(max(map(len, terminal.frames()[-1])), 60)
            terminal.resize(100, 40)
            victim = self.cluster.pids("expert")[-1]
            os.kill(victim, signal.SIGKILL)
            self.assertTrue(terminal.shows("lost"), terminal.frames()[-1])
            self.assertIn("\x1b[1;31mlost", terminal.text)
            self.assertTrue(terminal.shows("experts    2 ready", 20))
            os.write(terminal.master, b"q")
            self.assertEqual(terminal.process.wait(5), 0)
            self.assertTrue(terminal.read().endswith("\x1b[?25h\x1b[?1049l"))
            self.assertEqual(termios.tcgetattr(terminal.slave)[3], terminal.before[3])
        finally:
            terminal.close()

    def test_a_signal_gives_the_terminal_back_too(self):
        terminal = Terminal(self.cluster.url, 100, 30, self.key_flag)
        try:
            self.assertTrue(terminal.shows("experts"))
            terminal.process.send_signal(signal.SIGTERM)
            self.assertEqual(terminal.process.wait(5), 0)
            self.assertTrue(terminal.read().endswith("\x1b[?25h\x1b[?1049l"))
        finally:
            terminal.close()

    def test_a_silent_gateway_is_said_and_comes_back(self):
        terminal = Terminal(self.cluster.url, 100, 30, self.key_flag)
        try:
            self.assertTrue(terminal.shows("experts"))
            gateway = self.cluster.pids("gateway")[-1]
            os.kill(gateway, signal.SIGSTOP)
            self.assertTrue(terminal.shows("trying again"), terminal.text)
            os.kill(gateway, signal.SIGCONT)
            self.assertTrue(wait_until(lambda: not any("trying again" in line for line in terminal.frames()[-1]), 15))
        finally:
            terminal.close()


if __name__ == "__main__":
    harness.main()
