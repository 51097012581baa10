//! Events as the tests need them. A field that is added to the output is null in all of them until an example
//! sets it.

use std::net::SocketAddr;

use serde_json::json;

use crate::event::{
    Act, Attribution, Cause, Close, ClosedBy, Connection, Direction, Ended, Endpoint, Event, Family, Frame,
    Holder, LastData, Lingering, LingeringKind, Lost, LostPlace, Opener, Process, Reset, Role, Shared,
    SignalFrom, Stack, State, Step, Time, Trigger,
};

pub(crate) fn all() -> Vec<Event> {
    vec![
        orderly(),
        unread_data(),
        unknown_owner(),
        ipv6(),
        destroyed(),
        reset_sent(),
        injected(),
        lingering(),
        not_reading(),
        lost(),
    ]
}

/// nginx, whose client stopped waiting.
pub(crate) fn orderly() -> Event {
    Event::Close(Box::new(Close {
        time: time("2026-03-01T12:01:02.123456789Z"),
        seq: 1,
        connection: connection("10.0.0.1:443", "10.0.0.2:51512"),
        process: Some(process(4312, "nginx", Attribution::Accept)),
        closed_by: Some(ClosedBy::Peer),
        ended: Some(Ended::Fin),
        trigger: Some(Trigger::Close),
        idle_ms: Some(350.25),
        last_data: Some(LastData::Received),
        since_sent_ms: Some(1100.0),
        since_received_ms: Some(350.25),
        unread_bytes: Some(0),
        unacked_bytes: Some(0),
        close_wait_ms: Some(1.5),
        states: vec![
            Step { state: State::Established, at_ms: 0.0 },
            Step { state: State::CloseWait, at_ms: 1200.0 },
            Step { state: State::LastAck, at_ms: 1201.5 },
            Step { state: State::Close, at_ms: 1202.0 },
        ],
        acts: vec![Act { trigger: Some(Trigger::Close), at_ms: Some(1201.5), pid: Some(4312), stack: None }],
        stack: Some(Stack { user: Some(vec![libc("close"), line()].into()), kernel: None }),
        opener: Some(Opener {
            process: Some(process(4311, "nginx", Attribution::Accept)),
            stack: Some(Stack { user: Some(vec![libc("accept4")].into()), kernel: None }),
        }),
        ..unknown_close()
    }))
}

/// The longest values that occur with IPv4.
pub(crate) fn unread_data() -> Event {
    let Event::Close(mut close) = orderly() else { unreachable!() };
    close.connection = connection("192.168.100.101:65535", "203.100.113.222:54321");
    close.process = Some(process(4_194_303, "systemd-resolve", Attribution::Syscall));
    close.closed_by = Some(ClosedBy::Local);
    close.ended = Some(Ended::ResetSent);
    close.trigger = Some(Trigger::Signal);
    close.signal = Some("SIGKILL".into());
    close.signal_from =
        Some(SignalFrom::Process { pid: Some(1), host_pid: Some(1), comm: "systemd".into(), uid: 0 });
    close.acts = vec![
        Act { trigger: Some(Trigger::Shutdown), at_ms: Some(850.0), pid: Some(4_194_303), stack: None },
        Act { trigger: Some(Trigger::Signal), at_ms: Some(1201.5), pid: Some(4_194_303), stack: None },
    ];
    close.cause = Some(Cause::UnreadData);
    close.last_data = Some(LastData::Sent);
    close.since_sent_ms = Some(350.25);
    close.since_received_ms = Some(60_350.0);
    close.unread_bytes = Some(1_536_000);
    close.unacked_bytes = Some(2_621_440);
    close.close_wait_ms = None;
    close.stack = Some(Stack {
        user: None,
        kernel: Some(vec![kernel("tcp_close", 0x1c), kernel("do_exit", 0)].into()),
    });
    close.opener = Some(Opener { process: close.process.clone(), stack: None });
    Event::Close(close)
}

/// An event about which almost nothing is known.
pub(crate) fn unknown_owner() -> Event {
    Event::Close(Box::new(unknown_close()))
}

/// An end of which only the time is known.
fn unknown_close() -> Close {
    // Read from JSON, where an absent field is null, so that a new field need not be added here.
    let line =
        json!({ "time": "2026-03-01T12:01:03Z", "seq": 1, "connection": {}, "states": [], "acts": [] });
    serde_json::from_value(line).expect("a close")
}

/// A keepalive that went unanswered.
pub(crate) fn ipv6() -> Event {
    let mut close = Box::new(unknown_close());
    close.connection = connection("[2001:db8:1234:5678:9abc:def0:1234:5678]:65535", "[::1]:443");
    close.connection.family = Some(Family::Ipv6);
    close.process = Some(process(77, "envoy", Attribution::Procfs));
    close.closed_by = Some(ClosedBy::Kernel);
    close.ended = Some(Ended::Timeout);
    close.cause = Some(Cause::KeepaliveTimeout);
    Event::Close(close)
}

/// `ss -K`, on a connection that a thread of a JVM opened.
pub(crate) fn destroyed() -> Event {
    let Event::Close(mut close) = unknown_owner() else { unreachable!() };
    close.connection = connection("10.0.0.1:443", "10.0.0.2:51512");
    let mut java = process(4312, "java", Attribution::Connect);
    java.thread = Some("http-nio-8080-e".into());
    close.process = Some(java);
    close.closed_by = Some(ClosedBy::Admin);
    close.ended = Some(Ended::Destroyed);
    close.cause = Some(Cause::Destroyed);
    close.destroyed_by = Some(process(977, "ss", Attribution::Syscall));
    Event::Close(close)
}

/// An answer to a packet for no socket at all.
pub(crate) fn reset_sent() -> Event {
    let mut connection = connection("10.0.0.1:81", "10.0.0.2:51512");
    connection.age_ms = None;
    connection.opened = None;
    let line = json!({ "time": "2026-03-01T12:01:02.5Z", "seq": 1, "connection": {}, "direction": "sent" });
    let mut reset: Box<Reset> = serde_json::from_value(line).expect("a reset");
    reset.connection = connection;
    reset.reason = Some("NO_SOCKET".to_owned().into());
    reset.cause = Some(Cause::NoListener);
    Event::Reset(reset)
}

/// A RST that a device on the path may have sent.
pub(crate) fn injected() -> Event {
    let Event::Reset(mut reset) = reset_sent() else { unreachable!() };
    reset.connection = connection("192.168.100.101:54321", "203.100.113.222:65535");
    reset.process = Some(process(4_194_303, "systemd-resolve", Attribution::Connect));
    reset.direction = Direction::Received;
    reset.reason = None;
    reset.cause = Some(Cause::SuspectedInjection);
    reset.state = Some(State::Established);
    reset.idle_ms = Some(0.35);
    reset.last_data = Some(LastData::Sent);
    reset.since_sent_ms = Some(0.35);
    reset.ttl = Some(249);
    reset.handshake_ttl = Some(57);
    reset.opener = Some(Opener {
        process: reset.process.clone(),
        stack: Some(Stack {
            user: Some(vec![libc("connect")].into()),
            kernel: Some(vec![kernel("tcp_v4_connect", 8)].into()),
        }),
    });
    Event::Reset(reset)
}

pub(crate) fn lingering() -> Event {
    Event::Lingering(Box::new(Lingering {
        time: time("2026-03-01T12:02:00Z"),
        seq: 1,
        connection: connection("10.0.0.1:443", "10.0.0.2:51512"),
        process: Some(process(4312, "java", Attribution::Listener)),
        state: State::CloseWait,
        since: Some(time("2026-03-01T12:01:45Z")),
        for_ms: Some(15_000.0),
        for_ms_at_most: Some(15_000.0),
        unread_bytes: Some(0),
        unsent_bytes: Some(0),
        trigger: None,
        signal: None,
        signal_from: None,
        stack: None,
        holders: Some(vec![
            Holder { pid: Some(4312), host_pid: Some(4312), comm: "java".into(), fd: 7 },
            Holder { pid: Some(4400), host_pid: Some(4400), comm: "worker".into(), fd: 12 },
        ]),
        opener: None,
        kind: LingeringKind::Leaked,
    }))
}

/// A process was killed while its peer did not read.
pub(crate) fn not_reading() -> Event {
    let Event::Lingering(mut lingering) = lingering() else { unreachable!() };
    lingering.state = State::FinWait1;
    lingering.unsent_bytes = Some(1_536_000);
    lingering.kind = LingeringKind::PeerNotReading;
    lingering.process = Some(process(4312, "redis-server", Attribution::Syscall));
    lingering.holders = Some(Vec::new());
    lingering.trigger = Some(Trigger::Signal);
    lingering.signal = Some("SIGKILL".into());
    lingering.signal_from = Some(SignalFrom::Kernel { oom: true });
    lingering.stack = Some(Stack { user: None, kernel: Some(vec![kernel("do_exit", 0)].into()) });
    Event::Lingering(lingering)
}

pub(crate) fn lost() -> Event {
    Event::Lost(Lost { time: time("2026-03-01T12:01:02Z"), seq: 1, place: LostPlace::RingBuffer, count: 17 })
}

pub(crate) fn time(text: &str) -> Time {
    Time(text.parse().expect("a time"))
}

fn connection(local: &str, remote: &str) -> Connection {
    let endpoint = |text: &str| {
        let address: SocketAddr = text.parse().expect("address and port");
        Endpoint { address: address.ip(), port: address.port() }
    };
    let connection = json!({
        "family": Family::Ipv4,
        "local": endpoint(local),
        "remote": endpoint(remote),
        "netns": 4_026_531_840_u32,
        "cookie": 4097,
        "role": Role::Server,
        "opened": time("2026-03-01T12:01:00.92Z"),
        "age_ms": 1203.4,
        "bytes_sent": 5120,
        "bytes_received": 331,
        "retransmits": 0,
        "rtt_us": 210,
    });
    serde_json::from_value(connection).expect("a connection")
}

pub(crate) fn process(pid: u32, comm: &str, attribution: Attribution) -> Shared<Process> {
    Shared::from(Process {
        pid: Some(pid),
        host_pid: Some(pid),
        tid: Some(pid),
        comm: comm.into(),
        thread: None,
        exe: Some(format!("/usr/sbin/{comm}")),
        uid: Some(33),
        container: None,
        container_name: None,
        pod: None,
        attribution,
    })
}

fn libc(symbol: &str) -> Frame {
    Frame {
        address: "0x7f0000001014".into(),
        symbol: Some(symbol.into()),
        module: Some("/usr/lib/libc.so.6".into()),
        offset: Some(0x14),
        file: None,
        line: None,
        inlined: false,
        truncated: None,
    }
}

fn line() -> Frame {
    Frame {
        address: "0x555500001234".into(),
        symbol: Some("app::handler".into()),
        module: Some("/usr/bin/app".into()),
        offset: Some(0x34),
        file: Some("src/x.rs".into()),
        line: Some(12),
        inlined: true,
        truncated: None,
    }
}

fn kernel(symbol: &str, offset: u64) -> Frame {
    Frame {
        address: "0xffffffff81000000".into(),
        symbol: Some(symbol.into()),
        module: None,
        offset: Some(offset),
        file: None,
        line: None,
        inlined: false,
        truncated: None,
    }
}
