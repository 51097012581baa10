//! Generates `fixtures/btf/members.c`, the C program that tells bpftool which parts of a kernel's BTF the
//! fixtures keep.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path};

use super::offsets::{Shape, members};

/// A bit field, for the test `other_sizes_are_missing`.
const BIT_FIELD: &str = "sock.sk_kern_sock";

/// Needed besides members: sizes of types, the tracepoints' prototypes, and the reasons for a RST.
const DECLARATIONS: &str = "\
enum sk_rst_reason { SK_RST_REASON_NOT_SPECIFIED };
union thread_union { unsigned long stack[1]; };
struct irq_stack { char stack[1]; };

typedef void (*btf_trace_inet_sock_set_state)(void *, const struct sock *, const int, const int);
typedef void (*btf_trace_tcp_send_reset___2)(void *, const struct sock *, const struct sk_buff *);
typedef void (*btf_trace_tcp_send_reset___3)(void *, const struct sock *, const struct sk_buff *,
					     const enum sk_rst_reason);
typedef void (*btf_trace_tcp_receive_reset)(void *, struct sock *);
typedef void (*btf_trace_tcp_destroy_sock)(void *, struct sock *);
";
const STATEMENTS: &str = "	SIZE(struct pt_regs);
	SIZE(union thread_union);
	SIZE(struct irq_stack);
	EXISTS(btf_trace_inet_sock_set_state);
	EXISTS(btf_trace_tcp_send_reset___2);
	EXISTS(btf_trace_tcp_send_reset___3);
	EXISTS(btf_trace_tcp_receive_reset);
	EXISTS(btf_trace_tcp_destroy_sock);
	sum += __builtin_preserve_enum_value(*(enum sk_rst_reason *)SK_RST_REASON_NOT_SPECIFIED, ENUM_VALUE);
";

/// A struct by the names of its members, or the member at the end of a path.
enum TypeTree {
    Struct(BTreeMap<&'static str, TypeTree>),
    Leaf(Shape),
    Bit,
}

/// The program. Its types are reduced to the members that are looked up; relocation matches names and kinds
/// of types, not sizes.
fn members_c() -> String {
    let mut types = BTreeMap::new();
    for member in members() {
        insert(&mut types, member.path, TypeTree::Leaf(member.shape));
    }
    insert(&mut types, BIT_FIELD, TypeTree::Bit);
    let mut text = "\
/* Generated from src/kernel/offsets.rs by `cargo xtask fixtures`. It touches, by CO-RE relocation, the kernel
 * types that tcpclose looks up, so that `bpftool gen min_core_btf` keeps them and nothing else. See
 * README.md. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

"
    .to_owned();
    for (name, members) in &types {
        declare(&mut text, name, members, 0);
    }
    text += DECLARATIONS;
    text += "
#pragma clang attribute pop

enum { BYTE_OFFSET = 0, TYPE_EXISTS = 0, TYPE_SIZE = 1, ENUM_VALUE = 1 };
#define FIELD(type, member) sum += __builtin_preserve_field_info(((type *)0)->member, BYTE_OFFSET)
#define EXISTS(type) sum += __builtin_preserve_type_info(*(type *)0, TYPE_EXISTS)
#define SIZE(type) sum += __builtin_preserve_type_info(*(type *)0, TYPE_SIZE)

__attribute__((section(\"raw_tp/members\"), used)) int members(void *context)
{
	unsigned long long sum = 0;

";
    for path in members().map(|member| member.path).chain([BIT_FIELD]) {
        if let Some((name, member)) = path.split_once('.') {
            let _ = writeln!(text, "\tFIELD(struct {name}, {member});");
        }
    }
    text + STATEMENTS + "	return (int)sum;\n}\n"
}

fn insert(members: &mut BTreeMap<&'static str, TypeTree>, path: &'static str, leaf: TypeTree) {
    let Some((name, rest)) = path.split_once('.') else {
        members.insert(path, leaf);
        return;
    };
    let found = members.entry(name).or_insert_with(|| TypeTree::Struct(BTreeMap::new()));
    let TypeTree::Struct(inner) = found else {
        panic!("{name} is a struct in one path, and none in another")
    };
    insert(inner, rest, leaf);
}

fn declare(text: &mut String, name: &str, declared: &TypeTree, depth: usize) {
    let indent = "\t".repeat(depth);
    let _ = match declared {
        TypeTree::Struct(members) => {
            let _ = if depth == 0 {
                writeln!(text, "struct {name} {{")
            } else {
                writeln!(text, "{indent}struct {{")
            };
            for (name, member) in members {
                declare(text, name, member, depth + 1);
            }
            if depth == 0 { writeln!(text, "}};\n") } else { writeln!(text, "{indent}}} {name};") }
        }
        TypeTree::Leaf(shape) => match shape {
            Shape::U8 => writeln!(text, "{indent}unsigned char {name};"),
            Shape::U16 => writeln!(text, "{indent}unsigned short {name};"),
            Shape::U32 => writeln!(text, "{indent}unsigned int {name};"),
            Shape::U64 => writeln!(text, "{indent}unsigned long long {name};"),
            Shape::Pointer => writeln!(text, "{indent}void *{name};"),
            Shape::Bytes(size) => writeln!(text, "{indent}char {name}[{size}];"),
            Shape::Struct(size) => writeln!(text, "{indent}struct {{ char bytes[{size}]; }} {name};"),
        },
        TypeTree::Bit => writeln!(text, "{indent}unsigned char {name} : 1;"),
    };
}

/// The checked-in file names every member that is looked up. With `TCPCLOSE_UPDATE_FIXTURES` set, as by
/// `cargo xtask fixtures`, the test writes the file.
#[test]
fn members_c_is_generated_from_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/btf/members.c");
    let generated = members_c();
    if env::var_os("TCPCLOSE_UPDATE_FIXTURES").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap();
    assert!(
        found == generated,
        "{} is not what src/kernel/offsets.rs gives; `cargo xtask fixtures` writes it",
        path.display()
    );
}
