"""Lets gdb follow code that has no unwind tables but keeps frame pointers, as just-in-time compilers make
it: code in memory that no file is mapped to, and what V8 has made ahead of time (`Builtins_...`). Leaves out
the functions that gdb adds between a caller and the function that was jumped to: they have no frame on the
stack."""
from collections import namedtuple

import gdb
from gdb.unwinder import Unwinder, register_unwinder

Id = namedtuple("Id", ["sp", "pc"])
# The instruction pointer, the stack pointer and the frame pointer.
REGISTERS = {"i386:x86-64": ("rip", "rsp", "rbp"), "aarch64": ("pc", "sp", "x29")}


def has_tables(address):
    if gdb.execute(f"info symbol {address}", to_string=True).startswith("Builtins_"):
        return False
    with open(f"/proc/{gdb.selected_inferior().pid}/maps") as mappings:
        for mapping in mappings:
            start, end = (int(part, 16) for part in mapping.split()[0].split("-"))
            if start <= address < end:
                return len(mapping.split()) > 5
    return False


class FramePointers(Unwinder):
    def __init__(self):
        super().__init__("frame pointers")

    def __call__(self, frame):
        registers = REGISTERS[frame.architecture().name()]
        address, _, pointer = (frame.read_register(name) for name in registers)
        if has_tables(int(address)):
            return None
        words = gdb.selected_inferior().read_memory(pointer, 16).cast("Q")
        top = pointer + 16
        caller = frame.create_unwind_info(Id(top, address))
        for name, value in zip(registers, (words[1], top, words[0])):
            caller.add_saved_register(name, gdb.Value(value).cast(pointer.type))
        return caller


class Frames:
    name = "frames on the stack"
    priority = 1
    enabled = True

    def filter(self, frames):
        return (frame for frame in frames if frame.inferior_frame().type() != gdb.TAILCALL_FRAME)


register_unwinder(None, FramePointers())
gdb.frame_filters[Frames.name] = Frames()
