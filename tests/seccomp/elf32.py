"""A 32-bit program made by hand, so that no test needs a compiler: opens AF_VSOCK through socketcall(2)."""

import struct

BASE = 0x0804_8000
HEADERS = 52 + 32  # the ELF header and one program header


def vsock_opener() -> bytes:
    """A static ELF32. It exits with 42 if the kernel made the socket, 43 if it refused."""
    before, after = (
        bytes.fromhex(
            "b866000000"  # mov eax, 102: socketcall
            "bb01000000"  # mov ebx, 1: SYS_SOCKET
            "b9"  # mov ecx, address of the arguments
        ),
        bytes.fromhex(
            "cd80"  # int 0x80
            "bb2a000000"  # mov ebx, 42
            "85c0"  # test eax, eax
            "7901"  # jns over the next instruction
            "43"  # inc ebx
            "b801000000"  # mov eax, 1: exit
            "cd80"  # int 0x80
        ),
    )
    start = BASE + HEADERS
    code = before + struct.pack("<I", start + len(before) + 4 + len(after)) + after
    arguments = struct.pack("<3I", 40, 1, 0)  # AF_VSOCK, SOCK_STREAM
    size = HEADERS + len(code) + len(arguments)
    header = b"\x7fELF\x01\x01\x01" + bytes(9)  # 32-bit, little-endian
    header += struct.pack("<2H5I6H", 2, 3, 1, start, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 0, BASE, BASE, size, size, 5, 0x1000)  # loaded, readable and executable
    return header + segment + code + arguments
