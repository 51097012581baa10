//! Writes the records of a recording (`tcpclose --record`) to files in a directory, one file for each, and
//! adds a record of each kind that recordings seldom contain: seeds of the target `decode`.
//!
//!     cargo run --example records -- ../tcpclose-user/fixtures/records/6.18-amd64.bin corpus/decode

use std::{env, fs, path::PathBuf};

use tcpclose_common::record::{Header, OwnerRecord, ProcessRecord, StackCopy, relation, tag};
use tcpclose_user::recording::{RecordingFrame, frames};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

fn main() {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let (Some(recording), Some(directory), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        panic!("usage: records RECORDING DIRECTORY");
    };
    let recorded = fs::read(&recording).expect("the recording can be read");
    let mut records: Vec<Vec<u8>> = frames(recorded.into())
        .expect("it is a recording")
        .into_iter()
        .filter_map(
            |frame| if let RecordingFrame::Record(record) = frame { Some(record.to_vec()) } else { None },
        )
        .collect();
    let of_kind = |kind: u16| {
        let has_kind =
            |record: &&Vec<u8>| Header::read_from_prefix(record).is_ok_and(|(header, _)| header.tag == kind);
        records.iter().find(has_kind).expect("every recording has one").clone()
    };

    let mut stuck = of_kind(tag::CLOSE);
    let mut header = Header::read_from_prefix(&stuck).expect("a record has a header").0;
    header.tag = tag::STUCK;
    stuck[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    let mut owner = OwnerRecord::read_from_bytes(&of_kind(tag::OWNER)).expect("an owner");
    (owner.relation, owner.fd) = (relation::ASKED, 3);
    let mut process = ProcessRecord::new_zeroed();
    process.header = Header { tag: tag::PROCESS, length: size_of::<ProcessRecord>() as u32, ..header };
    let mut stack = StackCopy::new_zeroed();
    stack.bytes = 64;
    stack.header = Header { tag: tag::STACK, length: size_of::<StackCopy>() as u32 + stack.bytes, ..header };

    records.extend([stuck, owner.as_bytes().to_vec(), process.as_bytes().to_vec()]);
    records.push([stack.as_bytes(), &[0; 64]].concat());
    fs::create_dir_all(&directory).expect("the directory can be created");
    for (index, record) in records.iter().enumerate() {
        fs::write(directory.join(format!("record-{index:02}")), record).expect("the seed can be written");
    }
    println!("{} records written to {}", records.len(), directory.display());
}
