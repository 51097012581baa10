//! Recognizes user stacks that the user half has unwound before, by their recipes
//! (`tcpclose_common::recipe`).

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_probe_read_user},
    macros::map,
    maps::{Array, HashMap},
};
use tcpclose_common::{
    recipe::{
        Edge, EdgeTarget, KEY_BIT, MAX_EDGES, MAX_RECIPES, MAX_WORDS, PLACE_BITS, Recipe, image, source,
    },
    record::STACK_STEP,
};

use crate::{
    current::{Current, with_current},
    interpreter,
    kernel::{Object, member},
    maps::{REGISTERS, SCRATCH, Slot, global},
};

/// Recipes, 8.1 MiB. The user half chooses the places.
#[map]
pub static RECIPES: Array<Recipe> = Array::with_max_entries(MAX_RECIPES, 0);

/// The edges between recipes. Not LRU: a missing edge would make a whole tree unreachable.
#[map]
pub static RECIPE_EDGES: HashMap<Edge, EdgeTarget> = HashMap::with_max_entries(MAX_EDGES, 0);

/// How long a stack is recognized after its recipe has expired, while one copy of it is on its way to the
/// user half.
const RENEWAL: u64 = 1_000_000_000;

/// The bits of an index in `RECIPES`.
const PLACE_MASK: u64 = (1 << PLACE_BITS) - 1;

/// The registers and the address space with which the current task entered the kernel.
#[derive(Clone, Copy)]
pub struct KernelEntry {
    /// Process id.
    pub pid: u32,
    /// Address of its `mm_struct`.
    pub mm: u64,
    /// How many pages of code are mapped (`mm_struct.exec_vm`).
    pub code_pages: u64,
    pub ip: u64,
    pub sp: u64,
    pub fp: u64,
    pub lr: u64,
}

impl KernelEntry {
    /// Those of the current task, which belongs to process `pid` with the memory `mm`; `None` if they cannot
    /// be read.
    #[inline(always)]
    pub fn of_current(pid: u32, mm: u64) -> Option<Self> {
        with_current!(|current| Self::read(current.registers(), pid, mm))
    }

    #[inline(always)]
    fn read(registers: impl Object, pid: u32, mm: u64) -> Option<Self> {
        Some(Self {
            pid,
            mm,
            code_pages: member(mm, global!(PARAMS.code_pages)).unwrap_or(0),
            ip: member(registers, global!(PARAMS.registers.ip))?,
            sp: member(registers, global!(PARAMS.registers.sp))?,
            fp: member(registers, global!(PARAMS.registers.fp)).unwrap_or(0),
            lr: member(registers, global!(PARAMS.registers.lr)).unwrap_or(0),
        })
    }
}

/// The key that the user half has given to the current task's user stack; 0 if there is no recipe for it. The
/// task belongs to process `pid` with the memory `mm`.
///
/// It calls global functions, the largest part of the code that takes stacks, so that the verifier examines
/// them once instead of once for each caller. Before 5.13 such a function takes numbers only.
#[inline(always)]
pub fn recognized(pid: u64, mm: u64) -> u64 {
    let found = matched(pid, mm);
    if found == 0 || found & KEY_BIT != 0 {
        found
    } else {
        decided(found, interpreter::interpreted(pid, mm, 0))
    }
}

/// The key of the current task's user stack as far as its words decide it; otherwise 0, or [`undecided`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn matched(pid: u64, mm: u64) -> u64 {
    let Some(entry) = KernelEntry::of_current(pid as u32, mm) else { return 0 };
    if !entry.sp.is_multiple_of(8) {
        return 0;
    }
    let Some(slot) = Slot::take() else { return 0 };
    // All keys use the same memory on the stack.
    let root = Edge { from: entry.mm, at: entry.ip, word: image(entry.pid, entry.code_pages) };
    let Some(target) = RECIPE_EDGES.get_ptr(root) else { return 0 };
    // SAFETY: the slot is ours, its members are plain integers. `target` is a map value; the user half only adds
    // and removes edges, and never changes one. There is no reference, because `compared()` uses the slot, too.
    unsafe {
        let comparison = &raw mut (*slot.get()).comparison;
        (*comparison).target = *target;
        (*comparison).sp = entry.sp;
        (*comparison).registers[source::FRAME_POINTER as usize] = entry.fp.wrapping_sub(entry.sp);
        (*comparison).registers[source::FRAME_POINTER_VALUE as usize] = entry.fp;
        (*comparison).registers[source::LINK_REGISTER as usize] = entry.lr;
        (*comparison).start = NO_WINDOW;
    }
    let mut part = 0;
    while part < PARTS {
        let found = compared(slot.number(), part);
        if found != UNFINISHED {
            return found;
        }
        part += 1;
    }
    0
}

/// No window begins here.
const NO_WINDOW: u64 = 1;

/// The number of words that one call of [`compared`] compares, and the number of calls for the longest recipe.
/// Most recipes need one.
const PART: usize = 32;
const PARTS: u64 = (MAX_WORDS / PART) as u64;

/// The result of [`compared`] if all words agree, and the recipe has more.
const UNFINISHED: u64 = 1;

/// Compares one part of the words, in a slot of `SCRATCH`. Returns the key of the stack if it is decided, 0 if
/// there is no recipe for the stack, [`undecided`] or [`UNFINISHED`]. It reads 1 KiB of the stack at a time.
///
/// It is a global function, so that the verifier examines one part only.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn compared(slot: u64, part: u64) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(slot as u32) else { return 0 };
    // SAFETY: the slot belongs to the program that called, its members are plain integers.
    let (comparison, window) = unsafe { (&mut (*scratch).comparison, &raw mut (*scratch).window) };
    let sp = comparison.sp;
    let mut start = comparison.start;
    let mut target = comparison.target;
    let Some(mut recipe) = RECIPES.get_ptr_mut(target.index as u32) else { return 0 };
    let first = (part % PARTS) as usize * PART;
    let mut step = 0;
    while step < PART {
        let index = first + step;
        // SAFETY: a map value, and the index is below the length of the array.
        let (count, word) = unsafe { ((*recipe).count, (*recipe).words[index]) };
        if index as u64 >= count {
            break;
        }
        let actual = if word.source > source::STACK_ADDRESS {
            if word.source == source::INTERPRETER {
                return undecided(&target);
            }
            comparison.registers[word.source as usize % REGISTERS]
        } else {
            let address = sp.wrapping_add(i64::from(word.offset) as u64);
            let begin = address & !(STACK_STEP as u64 - 1);
            if begin != start {
                // SAFETY: the window has room, and the helper checks the address itself.
                if unsafe { bpf_probe_read_user(window.cast(), STACK_STEP as u32, begin as *const _) } != 0 {
                    return 0;
                }
                start = begin;
            }
            let place = (address as usize & (STACK_STEP - 1)) / 8;
            // SAFETY: the place is below the length of the window.
            let found = unsafe { (*window)[place] };
            // The stack pointer is subtracted from an address in the stack, without a branch.
            found.wrapping_sub(sp & 0_u64.wrapping_sub(u64::from(word.source & source::STACK_ADDRESS)))
        };
        if actual != word.expected {
            // The words that were compared so far must have belonged to this recipe. SAFETY: a map value.
            // Volatile, so that it is read now.
            if unsafe { (&raw const (*recipe).serial).read_volatile() } != target.serial {
                return 0;
            }
            let edge = Edge { from: target.serial, at: index as u64, word: actual };
            let Some(next) = follow(&edge) else { return 0 };
            (target, recipe) = next;
        }
        step += 1;
    }
    let index = (first + step) as u64;
    // SAFETY: a map value.
    let count = unsafe { (*recipe).count };
    if index == count {
        return stack(&target, recipe);
    }
    comparison.target = target;
    comparison.start = start;
    if index < count { UNFINISHED } else { 0 }
}

/// The result of [`matched`] for a recipe whose last word is the hash of the interpreter's frames, if the
/// words before it agree.
#[inline(always)]
fn undecided(target: &EdgeTarget) -> u64 {
    target.serial << PLACE_BITS | target.index & PLACE_MASK
}

/// The key of the stack that belongs to this hash of the interpreter's frames; 0 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decided(undecided: u64, hash: u64) -> u64 {
    let mut target = EdgeTarget { serial: undecided >> PLACE_BITS, index: undecided & PLACE_MASK };
    let Some(mut recipe) = RECIPES.get_ptr_mut(target.index as u32) else { return 0 };
    // SAFETY: a map value.
    let last = unsafe { (*recipe).count }.wrapping_sub(1);
    // SAFETY: a map value, and the index is below the length of the array.
    let (word, serial) = unsafe {
        ((*recipe).words[last as usize % MAX_WORDS], (&raw const (*recipe).serial).read_volatile())
    };
    if serial != target.serial || word.source != source::INTERPRETER {
        return 0;
    }
    if word.expected != hash {
        let Some(next) = follow(&Edge { from: serial, at: last, word: hash }) else { return 0 };
        (target, recipe) = next;
    }
    stack(&target, recipe)
}

/// The key of the stack that a recipe leads to when all of its words agree; 0 if the recipe has expired or
/// was replaced.
#[inline(always)]
fn stack(target: &EdgeTarget, recipe: *mut Recipe) -> u64 {
    // SAFETY: a map value.
    let (until, stack) = unsafe { ((*recipe).until, (*recipe).stack) };
    if until != 0 {
        // SAFETY: the helper has no precondition.
        let now = unsafe { bpf_ktime_get_ns() };
        if now > until {
            // This copy renews the recipe. If two CPUs are here at once, there are two copies.
            // SAFETY: a map value.
            unsafe { (*recipe).until = now + RENEWAL };
            return 0;
        }
    }
    // SAFETY: as above.
    if unsafe { (&raw const (*recipe).serial).read_volatile() } == target.serial { stack } else { 0 }
}

/// The recipe that an edge leads to.
#[inline(always)]
fn follow(edge: &Edge) -> Option<(EdgeTarget, *mut Recipe)> {
    let target = RECIPE_EDGES.get_ptr(edge)?;
    // SAFETY: a map value; the user half only adds and removes edges, and never changes one.
    let target = unsafe { *target };
    let recipe = RECIPES.get_ptr_mut(target.index as u32)?;
    Some((target, recipe))
}
