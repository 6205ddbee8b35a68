"""Runs inside a box and tries every closed call; prints one JSON object, name -> what happened.

Standard library only: the test hands this file to `python3 -c`. A call that a filter closes must answer
with the errno in its row. The arguments are chosen so that an unfiltered kernel answers something *else*
(often EBADF or EFAULT, as the call comes to nothing) wherever it can be told apart: `twin` says so.
Not here: uretprobe and uprobe, which Linux lets through every filter since 6.14 and answers with SIGILL.
"""

import ctypes
import errno
import json
import mmap
import os
import platform
import signal
from typing import NamedTuple

X86 = platform.machine() == "x86_64"
NONE = 0xFFFF_FFFF_FFFF_FFFF  # -1 as the register holds it
BAD = 0xFFF  # an address nobody maps
HIGH = 1 << 32  # junk above the 32 bits of an int
FASTOPEN = 0x2000_0000
BUFFER = "a zeroed page"
SELF = "own pid"
CWD = 0xFFFF_FFFF_FFFF_FF9C  # AT_FDCWD
SCRATCH = "a path in /tmp"
ABSENT = "a path where nothing is"
FOLDER = "/tmp"


class Probe(NamedTuple):
    """One call: numbers on x86_64 and aarch64, arguments, the errno a box must answer with."""

    x86: int
    arm: int
    args: tuple
    closed: str = "EPERM"
    twin: bool = True


PROBES = {
    "io_uring_setup": Probe(425, 425, (0, 0), "ENOSYS"),
    "io_uring_enter": Probe(426, 426, (NONE, 0, 0, 0, 0), "ENOSYS"),
    "io_uring_register": Probe(427, 427, (NONE, 0, 0, 0), "ENOSYS"),
    "clone3": Probe(435, 435, (0, 0), "ENOSYS"),
    "memfd_secret": Probe(447, 447, (NONE,), "ENOSYS"),
    "cachestat": Probe(451, 451, (NONE, 0, 0, 0), "ENOSYS"),
    "map_shadow_stack": Probe(453, 453, (0, 0, NONE), "ENOSYS"),
    "statmount": Probe(457, 457, (0, 0, 0, 0), "ENOSYS"),
    "listmount": Probe(458, 458, (0, 0, 0, 0), "ENOSYS"),
    "lsm_list_modules": Probe(461, 461, (0, 0, 0), "ENOSYS"),
    "setxattrat": Probe(463, 463, (NONE, 0, 0, 0, 0, 0), "ENOSYS"),
    "a call of the future": Probe(700, 700, (), "ENOSYS", twin=False),
    "setxattr": Probe(188, 5, (0, 0, 0, 0, 0), "ENOTSUP"),
    "lsetxattr": Probe(189, 6, (0, 0, 0, 0, 0), "ENOTSUP"),
    "fsetxattr": Probe(190, 7, (NONE, 0, 0, 0, 0), "ENOTSUP"),
    "removexattr": Probe(197, 14, (0, 0), "ENOTSUP"),
    "ptrace": Probe(101, 117, (0, 0, 0, 0)),  # PTRACE_TRACEME
    "process_vm_readv": Probe(310, 270, (SELF, 0, 0, 0, 0, 0)),
    "process_vm_writev": Probe(311, 271, (SELF, 0, 0, 0, 0, 0)),
    "pidfd_getfd": Probe(438, 438, (NONE, 0, 0)),
    "process_madvise": Probe(440, 440, (NONE, 0, 0, 0, 0)),
    "process_mrelease": Probe(448, 448, (NONE, 0)),
    "kcmp": Probe(312, 272, (SELF, SELF, 0, 0, 0)),
    "userfaultfd": Probe(323, 282, (1,)),  # UFFD_USER_MODE_ONLY
    "bpf": Probe(321, 280, (0, BUFFER, 1 << 20)),
    "perf_event_open": Probe(298, 241, (0, 0, 0, NONE, NONE)),
    "fanotify_init": Probe(300, 262, (0x200, 0)),  # FAN_REPORT_FID
    "fanotify_mark": Probe(301, 263, (NONE, 0, 0, 0, 0)),
    "add_key": Probe(248, 217, (0, 0, 0, 0, 0)),
    "request_key": Probe(249, 218, (0, 0, 0, 0)),
    "keyctl": Probe(250, 219, (9999, 0, 0, 0, 0)),
    "mount": Probe(165, 40, (0, 0, 0, 0, 0)),
    "umount2": Probe(166, 39, (0, 0x1000)),
    "open_tree": Probe(428, 428, (NONE, 0, 0x7FFF_FFFF)),
    "move_mount": Probe(429, 429, (NONE, 0, NONE, 0, 0), twin=False),
    "fsopen": Probe(430, 430, (0, 0), twin=False),
    "fsconfig": Probe(431, 431, (NONE, 0, 0, 0, 0)),
    "fsmount": Probe(432, 432, (NONE, 0, 0), twin=False),
    "fspick": Probe(433, 433, (NONE, 0, 0), twin=False),
    "mount_setattr": Probe(442, 442, (NONE, 0, 0x7FFF_FFFF, 0, 0)),
    "pivot_root": Probe(155, 41, (0, 0), twin=False),
    "chroot": Probe(161, 51, (0,)),
    "setns": Probe(308, 268, (NONE, 0)),
    "unshare of a user namespace": Probe(272, 97, (0x1000_0000,)),
    "unshare of files": Probe(272, 97, (0x400,)),
    "clone of a user namespace": Probe(56, 220, (0x1000_0000 | 17, 0, 0, 0, 0)),
    "clone of a user and a network namespace": Probe(56, 220, (0x5000_0000 | 17, 0, 0, 0, 0)),
    "clone of a user namespace, high bits set": Probe(56, 220, (HIGH | 0x1000_0000 | 17, 0, 0, 0, 0)),
    "name_to_handle_at": Probe(303, 264, (NONE, 0, 0, 0, 0)),
    "open_by_handle_at": Probe(304, 265, (NONE, 0, 0), twin=False),
    "mknod of a device": Probe(133, -1, (SCRATCH, 0o020600, 0x103), twin=False),
    "mknod of a plain file": Probe(133, -1, (SCRATCH, 0o100600, 0)),
    "mknodat of a device": Probe(259, 33, (CWD, SCRATCH, 0o020600, 0x103), twin=False),
    "mknodat of a socket": Probe(259, 33, (CWD, SCRATCH, 0o140600, 0)),
    "mknodat of a setuid pipe": Probe(259, 33, (CWD, SCRATCH, 0o014600, 0)),
    "chmod to setuid": Probe(90, -1, (ABSENT, 0o4755)),
    "chmod to setgid": Probe(90, -1, (ABSENT, 0o2755)),
    "chmod to setuid, high bits set": Probe(90, -1, (ABSENT, HIGH | 0o4755)),
    "fchmod to setuid": Probe(91, 52, (NONE, 0o4755)),
    "fchmod to setgid": Probe(91, 52, (NONE, 0o2755)),
    "fchmodat to setuid": Probe(268, 53, (CWD, ABSENT, 0o4755)),
    "creat of a setuid file": Probe(85, -1, (SCRATCH, 0o4755)),
    "open of a new setuid file": Probe(2, -1, (SCRATCH, 0o102, 0o4755)),
    "open of a new setgid file": Probe(2, -1, (SCRATCH, 0o102, 0o2755)),
    "openat of a new setuid file": Probe(257, 56, (CWD, SCRATCH, 0o102, 0o4755)),
    "openat of a new setuid file, high bits set": Probe(257, 56, (CWD, SCRATCH, HIGH | 0o102, HIGH | 0o4755)),
    "openat of a nameless setuid file": Probe(257, 56, (CWD, FOLDER, 0o20200002, 0o4755)),
    "openat2": Probe(437, 437, (CWD, SCRATCH, BUFFER, 24), "ENOSYS"),
    "shmget": Probe(29, 194, (0, 4096, 0o600)),
    "shmat": Probe(30, 196, (0x7FFF_FFFF, 0, 0)),
    "semget": Probe(64, 190, (0, 1, 0o600)),
    "semop": Probe(65, 193, (0x7FFF_FFFF, BUFFER, 1)),
    "msgget": Probe(68, 186, (0, 0o600)),
    "msgsnd": Probe(69, 189, (0x7FFF_FFFF, 0, 0, 0)),
    "mq_open": Probe(240, 180, (0, 0, 0, 0)),
    "mq_unlink": Probe(241, 181, (0,)),
    "io_setup": Probe(206, 0, (1, BUFFER)),
    "io_submit": Probe(209, 2, (0, 0, 0)),
    "io_pgetevents": Probe(333, 292, (0, 0, 0, 0, 0, 0)),
    "remap_file_pages": Probe(216, 234, (0, 0, 1, 0, 0)),
    "vmsplice": Probe(278, 75, (NONE, 0, 0, 0)),
    "modify_ldt": Probe(154, -1, (0, BUFFER, 8)),
    "mbind": Probe(237, 235, (0, 0, 99, 0, 0, 0)),
    "move_pages": Probe(279, 239, (0, 0, 0, 0, 0, 0xFF)),
    "adjtimex": Probe(159, 171, (BUFFER,)),
    "clock_adjtime": Probe(305, 266, (0, BUFFER)),
    "clock_settime": Probe(227, 112, (0, BAD)),
    "settimeofday": Probe(164, 170, (BAD, 0)),
    "quotactl": Probe(179, 60, (0, 0, 0, 0)),
    "quotactl_fd": Probe(443, 443, (NONE, 0, 0, 0)),
    "acct": Probe(163, 89, (0,), twin=False),
    "syslog": Probe(103, 116, (10, 0, 0), twin=False),  # depends on dmesg_restrict
    "swapon": Probe(167, 224, (0, 0), twin=False),
    "swapoff": Probe(168, 225, (0,), twin=False),
    "reboot": Probe(169, 142, (0, 0, 0, 0), twin=False),
    "kexec_load": Probe(246, 104, (0, 0, 0, 0), twin=False),
    "init_module": Probe(175, 105, (0, 0, 0), twin=False),
    "finit_module": Probe(313, 273, (NONE, 0, 0), twin=False),
    "delete_module": Probe(176, 106, (0, 0), twin=False),
    "sethostname": Probe(170, 161, (0, 0), twin=False),
    "iopl": Probe(172, -1, (4,)),
    "ioperm": Probe(173, -1, (NONE, 0, 0)),
    "sysfs": Probe(139, -1, (3, 0, 0)),
    "personality without address randomisation": Probe(135, 92, (0x004_0000,)),
    "personality, high bits set": Probe(135, 92, (HIGH,)),
    "ioctl TIOCSTI": Probe(16, 29, (NONE, 0x5412, 0)),
    "ioctl TIOCSTI, high bits set": Probe(16, 29, (NONE, HIGH | 0x5412, 0)),
    "ioctl TIOCLINUX": Probe(16, 29, (NONE, 0x541C, 0)),
    "ioctl TIOCLINUX, high bits set": Probe(16, 29, (NONE, 0xFFFF_FFFF_0000_541C, 0)),
    "ioctl TIOCSETD": Probe(16, 29, (NONE, 0x5423, 0)),
    "setsockopt TCP_ULP": Probe(54, 208, (NONE, 6, 31, 0, 0)),
    "setsockopt TCP_ULP, high bits set": Probe(54, 208, (NONE, 6, HIGH | 31, 0, 0)),
    "sendto with MSG_FASTOPEN": Probe(44, 206, (NONE, 0, 0, FASTOPEN, 0, 0)),
    "sendto with MSG_FASTOPEN, high bits set": Probe(44, 206, (NONE, 0, 0, HIGH | FASTOPEN | 0x4000, 0, 0)),
    "sendmsg with MSG_FASTOPEN": Probe(46, 211, (NONE, BUFFER, FASTOPEN)),
    "sendmmsg with MSG_FASTOPEN": Probe(307, 269, (NONE, BUFFER, 1, FASTOPEN)),
    "socketpair of AF_TIPC": Probe(53, 199, (30, 1, 0, BUFFER)),
}


def _socket(domain: int, kind: int, protocol: int, *, twin: bool = True) -> Probe:
    return Probe(41, 198, (domain, kind, protocol), twin=twin)


PROBES |= {
    f"socket family {family}": _socket(family, 1, 0, twin=family != 44)  # AF_XDP wants a capability anyway
    for family in range(47)
    if family not in {1, 2, 10, 16, 17}  # AF_PACKET has its own row
}
PROBES |= {
    "socket AF_VSOCK, high bits set": _socket(HIGH | 40, 1, 0),
    "socket AF_VSOCK, sign bits set": _socket(0xFFFF_FFFF_0000_0028, 1, 0),
    "socket AF_UNIX, high bits set": _socket(HIGH | 1, 1, 0),
    "socket AF_ALG": _socket(38, 5, 0),
    "socket AF_PACKET": _socket(17, 3, 0x300, twin=False),  # the kernel wants CAP_NET_RAW and says EPERM too
    "socket SOCK_PACKET": _socket(2, 10, 0x300, twin=False),
    "socket raw ICMP": _socket(2, 3, 1, twin=False),
    "socket raw ICMPv6": _socket(10, 3, 58, twin=False),
    "socket raw, close-on-exec": _socket(2, 3 | 0o2000000, 255, twin=False),
    "socket ping": _socket(2, 2, 1),
    "socket ping IPv6": _socket(10, 2, 58),
    "socket UDP-Lite": _socket(2, 2, 136),
    "socket SCTP": _socket(2, 1, 132),
    "socket MPTCP": _socket(2, 1, 262),
    "socket MPTCP IPv6": _socket(10, 1, 262),
    "socket MPTCP, non-blocking": _socket(2, 1 | 0o4000, 262),
    "socket MPTCP, high bits in type": _socket(2, HIGH | 1, 262),
    "socket MPTCP, high bits in protocol": _socket(2, 1, HIGH | 262),
    "socket TCP, high bits in protocol": _socket(2, 1, HIGH | 6),
    "socket DCCP": _socket(2, 6, 33),
    "socket seqpacket": _socket(2, 5, 0),
}
PROBES |= {f"netlink protocol {number}": _socket(16, 3, number) for number in (4, 6, 9, 12, 15, 16, 20, 21)}
PROBES |= {"netlink ROUTE, high bits set": _socket(16, 3, HIGH)}

# The near neighbours of what is closed must stay open: else a filter that closes everything would pass.
OPEN = {
    "socket AF_UNIX": (_socket(1, 1, 0), "ok"),
    "socket AF_UNIX seqpacket": (_socket(1, 5 | 0o2004000, 0), "ok"),
    "socket TCP": (_socket(2, 1 | 0o2004000, 6), "ok"),
    "socket TCP default": (_socket(2, 1, 0), "ok"),
    "socket UDP": (_socket(2, 2 | 0o2000000, 17), "ok"),
    "socket TCP IPv6": (_socket(10, 1, 6), "ok"),
    "socket UDP IPv6": (_socket(10, 2, 0), "ok"),
    "netlink ROUTE": (_socket(16, 3 | 0o2000000, 0), "ok"),
    "netlink ROUTE datagram": (_socket(16, 2, 0), "ok"),
    "socketpair": (Probe(53, 199, (1, 1, 0, BUFFER)), "ok"),
    "personality query": (Probe(135, 92, (0xFFFF_FFFF,)), "ok"),
    "ioctl before TIOCSTI": (Probe(16, 29, (NONE, 0x5411, 0)), "EBADF"),
    "ioctl after TIOCSTI": (Probe(16, 29, (NONE, 0x5413, 0)), "EBADF"),
    "ioctl FIONBIO": (Probe(16, 29, (NONE, 0x5421, 0)), "EBADF"),
    "ioctl sign-extended": (Probe(16, 29, (NONE, 0xFFFF_FFFF_8004_5430, 0)), "EBADF"),
    "ioctl zero": (Probe(16, 29, (NONE, 0, 0)), "EBADF"),
    "ioctl all ones": (Probe(16, 29, (NONE, NONE, 0)), "EBADF"),
    "setsockopt 30": (Probe(54, 208, (NONE, 6, 30, 0, 0)), "EBADF"),
    "setsockopt 32": (Probe(54, 208, (NONE, 0, 32, 0, 0)), "EBADF"),
    "sendto": (Probe(44, 206, (NONE, 0, 0, 0x4000, 0, 0)), "EBADF"),
    "sendmsg": (Probe(46, 211, (NONE, BUFFER, 0x4000)), "EBADF"),
    "sendmmsg": (Probe(307, 269, (NONE, BUFFER, 1, 0x4000)), "EBADF"),
    "clone": (Probe(56, 220, (17, 0, 0, 0, 0)), "ok"),
    "mknod of a pipe": (Probe(133, -1, (SCRATCH, 0o010600, 0)), "ok"),
    "mknodat of a pipe": (Probe(259, 33, (CWD, SCRATCH, 0o010600, 0)), "ok"),
    "chmod": (Probe(90, -1, (ABSENT, 0o1777)), "ENOENT"),
    "fchmod": (Probe(91, 52, (NONE, 0o755)), "EBADF"),
    "fchmodat": (Probe(268, 53, (CWD, ABSENT, 0o755)), "ENOENT"),
    "creat": (Probe(85, -1, (SCRATCH, 0o755)), "ok"),
    "open of a new file": (Probe(2, -1, (SCRATCH, 0o102, 0o755)), "ok"),
    "open of what is there, with rubbish for a mode": (Probe(2, -1, (FOLDER, 0o200000, NONE)), "ok"),
    "openat of a new file": (Probe(257, 56, (CWD, SCRATCH, 0o102, 0o755)), "ok"),
    "openat of what is there, with rubbish for a mode": (Probe(257, 56, (CWD, FOLDER, 0o200000, NONE)), "ok"),
    "landlock_create_ruleset": (Probe(444, 444, (0, 0, 1)), "ok"),
}


def attempt(probe: Probe) -> str:
    """Make the call in this process: "ok" or the name of its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    page = ctypes.create_string_buffer(4096)
    path = ctypes.create_string_buffer(f"/tmp/probe-{os.getpid()}".encode())
    absent = ctypes.create_string_buffer(b"/tmp/absent")
    folder = ctypes.create_string_buffer(FOLDER.encode())
    special = {
        BUFFER: ctypes.addressof(page),
        SELF: os.getpid(),
        SCRATCH: ctypes.addressof(path),
        ABSENT: ctypes.addressof(absent),
        FOLDER: ctypes.addressof(folder),
    }
    args = [ctypes.c_ulong(special.get(arg, arg)) for arg in probe.args]
    parent = os.getpid()
    result = libc.syscall(ctypes.c_long(probe.x86 if X86 else probe.arm), *args)
    if os.getpid() != parent:
        os._exit(0)  # the child that clone made
    if result >= 0:
        return "ok"
    number = ctypes.get_errno()
    return "ENOTSUP" if number == errno.ENOTSUP else errno.errorcode[number]  # one number with two names


def int_0x80() -> str:
    """A 32-bit call (getpid, 20) out of a 64-bit program, which needs no 32-bit binary at all."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return "ok" if function() > 0 else "failed"


def in_child(act) -> str:
    """What `act` returned in a child of its own, or "signal N" if that died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os.write(writer, act().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"signal {-status}" if status < 0 else text


def main() -> None:
    """Try everything, and print it."""
    here = {name: probe for name, probe in PROBES.items() if (probe.x86 if X86 else probe.arm) >= 0}
    report = {name: in_child(lambda p=probe: attempt(p)) for name, probe in here.items()}
    report |= {f"open: {name}": in_child(lambda p=probe: attempt(p)) for name, (probe, _) in OPEN.items()}
    if X86:
        x32_getpid = Probe(0x4000_0000 | 39, -1, ())
        report["x32"] = in_child(lambda: attempt(x32_getpid))
        report["int 0x80"] = in_child(int_0x80)
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        report["status"] = dict(line.split(":\t", 1) for line in status.read().splitlines())["Seccomp"]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
