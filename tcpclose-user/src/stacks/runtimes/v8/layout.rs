//! The layout of V8's heap and frames, from the variables `v8dbg_*` that it exports for debuggers.
//!
//! <https://github.com/v8/v8/blob/12.4.254/tools/gen-postmortem-metadata.py>
//!
//! The list differs between versions. What it lacks is recognized by the types of the objects that are found
//! there, in the modules that read them.

use std::ops::Range;

use super::super::BinarySymbols;
use crate::stacks::memory::ProcessMemory;

/// What the names of the variables begin with.
const PREFIX: &str = "v8dbg_";

/// The number of variables that are read: node 16 to 25 have up to 540.
const MAX_VARIABLES: usize = 2_048;

/// Bytes of a heap object's fixed members. An offset beyond this is not one.
const MAX_OFFSET: i64 = 1_024;

/// The addresses, in the file, at which reading begins.
pub(super) struct V8Symbols {
    /// Names, without their prefix.
    variables: Vec<(String, u64)>,
    /// The builtin in which each interpreted function is. Stripped files do not show it.
    pub(super) interpreter: Option<Range<u64>>,
}

impl V8Symbols {
    /// Looks them up; `None` for any file but one that contains V8.
    pub(super) fn find(symbols: &dyn BinarySymbols) -> Option<Self> {
        let named = symbols.dynamic_with(PREFIX);
        let variables: Vec<_> = named
            .into_iter()
            .take(MAX_VARIABLES)
            .filter_map(|(name, range)| Some((name.strip_prefix(PREFIX)?.to_owned(), range.start)))
            .collect();
        if variables.is_empty() {
            return None;
        }
        Some(Self { variables, interpreter: symbols.local("Builtins_InterpreterEntryTrampoline") })
    }

    /// The address of one of the variables.
    pub(super) fn first(&self, bias: u64) -> u64 {
        self.variables.first().map_or(0, |(_, address)| bias.wrapping_add(*address))
    }
}

/// The values of the variables.
struct Variables(Vec<(String, i64)>);

impl Variables {
    fn read(memory: &ProcessMemory, bias: u64, symbols: &V8Symbols) -> Option<Self> {
        let value = |(name, address): &(String, u64)| {
            let value = memory.u32(bias.wrapping_add(*address))?.cast_signed();
            Some((name.clone(), i64::from(value)))
        };
        symbols.variables.iter().map(value).collect::<Option<_>>().map(Self)
    }

    /// The value of the variable with this name, or of the first one whose name begins so: the rest is the
    /// type of a member, which differs between versions.
    fn get(&self, prefix: &'static str) -> Result<i64, &'static str> {
        let exact = self.0.iter().find(|(name, _)| name == prefix);
        let found = exact.or_else(|| self.0.iter().find(|(name, _)| name.starts_with(prefix)));
        found.map(|(_, value)| *value).ok_or(prefix)
    }

    fn offset(&self, prefix: &'static str) -> Result<u64, &'static str> {
        self.get(prefix).and_then(|value| {
            u64::try_from(value).ok().filter(|offset| *offset <= MAX_OFFSET.unsigned_abs()).ok_or(prefix)
        })
    }

    fn number(&self, prefix: &'static str) -> Result<u16, &'static str> {
        self.get(prefix).and_then(|value| u16::try_from(value).map_err(|_| prefix))
    }

    /// The distance of a slot of a frame from its frame pointer.
    fn slot(&self, name: &'static str) -> Result<i64, &'static str> {
        self.get(name).and_then(|value| {
            Some(value).filter(|it| it % 8 == 0 && (-MAX_OFFSET..0).contains(it)).ok_or(name)
        })
    }
}

macro_rules! layout {
    ($($(#[$doc:meta])* $member:ident: $type:ty = $kind:ident $name:literal;)*) => {
        /// Offsets of members, types of objects and slots of frames.
        #[derive(Debug)]
        pub(super) struct V8Layout {
            /// Types of arrays of bytes.
            pub(super) byte_arrays: Vec<u16>,
            /// The object that refers to a `SharedFunctionInfo` for optimized code, from V8 12.5 on.
            pub(super) function_wrapper: Option<u16>,
            /// The place of instructions.
            pub(super) code: CodePlacement,
            /// The place of a table of source positions in a bytecode array.
            pub(super) positions: u64,
            /// Whether the positions of a scope are ahead of its variables, from V8 12.8 on.
            pub(super) has_positions_first: bool,
            $($(#[$doc])* pub(super) $member: $type),*
        }

        impl V8Layout {
            fn from(variables: &Variables) -> Result<Self, &'static str> {
                let types = ["type_ByteArray__", "type_TrustedByteArray__"];
                let has_wrapper = variables.get("class_BytecodeArray__wrapper__").is_ok();
                Ok(Self {
                    byte_arrays: types.into_iter().filter_map(|it| variables.number(it).ok()).collect(),
                    function_wrapper: variables.number("type_SharedFunctionInfoWrapper__").ok(),
                    code: CodePlacement::from(variables)?,
                    positions: if has_wrapper { 24 } else { 32 },
                    has_positions_first: variables.offset("scopeinfo_idx_first_vars")? > 3,
                    $($member: variables.$kind($name)?),*
                })
            }
        }
    };
}

layout! {
    fp_function: i64 = slot "off_fp_function";
    fp_bytecode: i64 = slot "off_fp_bytecode_array";
    fp_bytecode_offset: i64 = slot "off_fp_bytecode_offset";
    /// Of a map.
    instance_type: u64 = offset "class_Map__instance_type__";
    function_shared: u64 = offset "class_JSFunction__shared__";
    shared_name: u64 = offset "class_SharedFunctionInfo__name_or_scope_info__";
    shared_script: u64 = offset "class_SharedFunctionInfo__script";
    script_name: u64 = offset "class_Script__name__";
    script_source: u64 = offset "class_Script__source__";
    script_line_ends: u64 = offset "class_Script__line_ends__";
    /// The member has another use, and this name, for WebAssembly.
    script_functions: u64 = offset "class_Script__wasm_weak_instance_list__";
    array_length: u64 = offset "class_FixedArrayBase__length__";
    array_data: u64 = offset "class_FixedArray__data__";
    bytecode_data: u64 = offset "class_BytecodeArray__data__";
    /// In words behind the map.
    scope_locals: u64 = offset "scopeinfo_idx_ncontextlocals";
    scope_variables: u64 = offset "scopeinfo_idx_first_vars";
    string_length: u64 = offset "class_String__length__";
    one_byte_chars: u64 = offset "class_SeqOneByteString__chars__";
    two_byte_chars: u64 = offset "class_SeqTwoByteString__chars__";
    cons_first: u64 = offset "class_ConsString__first__";
    cons_second: u64 = offset "class_ConsString__second__";
    sliced_parent: u64 = offset "class_SlicedString__parent__";
    sliced_offset: u64 = offset "class_SlicedString__offset__";
    thin_actual: u64 = offset "class_ThinString__actual__";
    external_resource: u64 = offset "class_ExternalString__resource__";
    bytecode_type: u16 = number "type_BytecodeArray__";
    interpreter_data_type: u16 = number "type_InterpreterData__";
    code_type: u16 = number "type_Code__";
    shared_type: u16 = number "type_SharedFunctionInfo__";
    scope_type: u16 = number "type_ScopeInfo__";
    script_type: u16 = number "type_Script__";
    fixed_array_type: u16 = number "type_FixedArray__";
    oddball_type: u16 = number "type_Oddball__";
    first_nonstring_type: u16 = number "FirstNonstringType";
    representation_mask: u16 = number "StringRepresentationMask";
    encoding_mask: u16 = number "StringEncodingMask";
    one_byte_tag: u16 = number "OneByteStringTag";
    seq_tag: u16 = number "SeqStringTag";
    cons_tag: u16 = number "ConsStringTag";
    external_tag: u16 = number "ExternalStringTag";
    sliced_tag: u16 = number "SlicedStringTag";
    thin_tag: u16 = number "ThinStringTag";
}

/// The place of the instructions of a `Code` object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CodePlacement {
    /// In the object, up to V8 11.0.
    Within {
        /// From the object to the first instruction.
        start: u64,
        size: u64,
    },
    /// In an `InstructionStream`.
    Apart {
        stream_type: u16,
        /// From the stream to the first instruction.
        start: u64,
        /// In the `Code` object. `None` if it is not exported: 16 bytes behind the address of the first
        /// instruction, as in V8 11.1 to 11.3.
        size: Option<u64>,
    },
}

impl CodePlacement {
    fn from(variables: &Variables) -> Result<Self, &'static str> {
        let size = variables.offset("class_Code__instruction_size__");
        match variables.number("type_InstructionStream__") {
            Ok(stream_type) => Ok(Self::Apart {
                stream_type,
                start: variables.offset("class_InstructionStream__instruction_start__")?,
                size: size.ok(),
            }),
            Err(_) => Ok(Self::Within {
                start: variables.offset("class_Code__instruction_start__uintptr_t")?,
                size: size?,
            }),
        }
    }
}

impl V8Layout {
    /// Reads it from a process.
    ///
    /// # Errors
    /// What is missing, or has another value than here: pointers must not be compressed, as in node.
    pub(super) fn read(memory: &ProcessMemory, bias: u64, symbols: &V8Symbols) -> Result<Self, &'static str> {
        let variables = Variables::read(memory, bias, symbols).ok_or("its variables are not readable")?;
        let expected = [("HeapObjectTag", 1), ("SmiTag", 0), ("SmiTagMask", 1), ("SmiShiftSize", 31)];
        for (name, value) in expected.into_iter().chain([("TaggedSize", 8), ("class_HeapObject__map__", 0)]) {
            if variables.get(name)? != value {
                return Err(name);
            }
        }
        Self::from(&variables)
    }
}
