"""A PID 1 that does as an honest guest does until it is released, and then plays the trick named by $TRICK."""

# Appended to the guest: its names are here, and it runs in the guest's place.
# ruff: noqa: F821
# mypy: ignore-errors


class Hostile(Guest):
    """Answers an exec in ways no guest of ours does."""

    def execute(self, fields):
        self.link.socket.settimeout(None)
        self.kept = self.link.take(3)
        if getattr(self, self.environment[b"TRICK"].decode())(fields[0]) is None:
            close_all(self.kept)

    def answer_for_others(self, number):
        for other in (b"0" * 12, b"f" * 12, number[:-1], number + b"0", b""):
            for kind in (EXEC_STARTED, EXEC_EXITED):
                self.link.send(frame(kind, other, b"1", b"0"))
            self.link.send(frame(EXEC_GONE, other))
        self.link.send(frame(EXEC_STARTED, number, b"1"))
        self.link.send(frame(EXEC_EXITED, number, b"0", b"0"))
        self.link.send(frame(EXEC_EXITED, number, b"1", b"9"))
        self.link.send(frame(EXEC_GONE, number) * 3)

    def claim_another_id(self, number):
        self.link.send(frame(HELLO, b"running", b"2", b"0", b"0", b"1", b"another-agent"))
        self.link.send(frame(EXEC_STARTED, number, b"1", b"another-agent"))
        self.link.send(frame(EXEC_EXITED, number, b"4096", b"0"))

    def flood(self, _):
        flood = frame(EXEC_GONE, b"0" * 12) * 1000 + frame(200) * 4000
        for _ in range(200):
            self.link.send(flood)

    def say_half(self, number):
        self.link.send(frame(EXEC_STARTED, number, b"1")[:-1])

    def come_and_go(self, _):
        for _ in range(2000):
            again = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
            again.setblocking(False)
            try:
                again.connect(SOCKET)
                again.send(self.hello())
            except OSError:
                time.sleep(0.001)
            again.close()

    def forge_the_end(self, number):
        self.link.send(frame(EXEC_STARTED, number, b"1") + frame(EXITED, b"0", b"0") * 5000)

    def never_end(self, number):
        self.link.send(frame(EXEC_STARTED, number, b"1"))
        return "kept"

    def stay_silent(self, _):
        return "kept"

    def on_frame(self, kind, fields):
        if kind != EXEC_KILL:
            super().on_frame(kind, fields)


hide()
sys.exit(Hostile(sys.argv[1:]).run())
