"""Files of pictures and sound for scripts that show them to a server."""

import struct
import zlib


def png(width, height, lines, level=-1, depth=8, colour=2, interlace=0):
    """A PNG file; each of its lines begins with the kind of its filter."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, level)) + chunk(b"IEND", b"")


def wav(data, rate=16000):
    """A WAV file of one channel of 16 bits."""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", len(data))
    return head + data
