//! The tables of `tcpclose list`. With IPv4 addresses they fit into 100 columns.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    io::{self, BufWriter, Write},
};

use super::Towards;
use crate::{
    event::{Holder, Lingering, LingeringKind, Process, Shared, State, shown_pid},
    sink::{COLUMNS, Palette, bounds, cut, endpoint, escape, or_dash, width},
    sockets::{Counts, Outgoing, Scan, Unowned},
};

/// How many groups of lingering sockets are shown, and how many sockets of each. The rest is only counted.
const MAX_GROUPS: usize = 100;
const MAX_SHOWN: usize = 10;

/// How many processes and how many destinations are shown.
const MAX_PROCESSES: usize = 50;
const MAX_DESTINATIONS: usize = 5;

/// The percentage of ports in use from which on `connect()` may soon find none.
const SCARCE: f64 = 80.0;

/// The lingering sockets, grouped by process and remote end. They are added in the order of their age, oldest
/// first.
#[derive(Default)]
pub struct ListReport {
    groups: Vec<Group>,
    places: HashMap<GroupKey, usize>,
    total: u64,
    /// Sockets in groups beyond [`MAX_GROUPS`].
    others: u64,
}

/// The pid of the process, the network namespace, the remote end.
type GroupKey = (Option<u32>, Option<u32>, Option<Towards>);

struct Group {
    process: Option<Shared<Process>>,
    netns: Option<u32>,
    towards: Option<Towards>,
    shown: Vec<Lingering>,
    kinds: BTreeMap<(State, LingeringKind), u64>,
}

impl ListReport {
    /// Adds a socket, which must not be older than those added before.
    pub fn add(&mut self, lingering: Lingering) {
        self.total += 1;
        let towards = Towards::of(&lingering);
        let netns = lingering.connection.netns;
        let key = (lingering.process.as_ref().and_then(|process| process.pid), netns, towards);
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None if self.groups.len() == MAX_GROUPS => {
                self.others += 1;
                return;
            }
            None => {
                self.places.insert(key, self.groups.len());
                let process = lingering.process.clone();
                self.groups.push(Group {
                    process,
                    netns,
                    towards,
                    shown: Vec::new(),
                    kinds: BTreeMap::new(),
                });
                self.groups.len() - 1
            }
        };
        let group = &mut self.groups[place];
        *group.kinds.entry((lingering.state, lingering.kind)).or_default() += 1;
        if group.shown.len() < MAX_SHOWN {
            group.shown.push(lingering);
        }
    }

    /// Writes all tables.
    pub fn write(mut self, writer: &mut impl Write, palette: Palette, scan: &Scan) -> io::Result<()> {
        // The groups of a process are together, ordered by the oldest socket.
        let mut ranks = HashMap::new();
        for group in &self.groups {
            let next = ranks.len();
            ranks.entry(group.pid()).or_insert(next);
        }
        self.groups.sort_by_key(|group| ranks.get(&group.pid()).copied());
        let mut page = ReportPage { writer: BufWriter::new(writer), palette };
        self.lingering(&mut page)?;
        page.states(scan)?;
        page.time_wait(&scan.namespaces)?;
        page.writer.flush()
    }

    fn lingering<W: Write>(&self, page: &mut ReportPage<W>) -> io::Result<()> {
        if self.total == 0 {
            return page.line("No lingering sockets.");
        }
        page.header(&format!(
            "{:<15} {:<10} {:<16} {:>9}  {:<21}  FD, OTHERS' PID/FD",
            "LINGERING FOR", "STATE", "KIND", "WAITING", "LOCAL"
        ))?;
        for group in &self.groups {
            group.write(page)?;
        }
        if self.others > 0 {
            page.line(&format!(
                "and {} more in other groups; use -o json to list them, or filters to select",
                self.others
            ))?;
        }
        Ok(())
    }
}

impl Group {
    fn pid(&self) -> Option<u32> {
        self.process.as_ref().and_then(|process| process.pid)
    }

    fn write<W: Write>(&self, page: &mut ReportPage<W>) -> io::Result<()> {
        let total: u64 = self.kinds.values().sum();
        let mut title = match &self.process {
            Some(process) => format!("{} {}", process.shown_pid(), escape(&process.comm)),
            None => "no process".to_owned(),
        };
        let _ = match self.towards {
            Some(Towards::To(remote)) => write!(title, "  to {}", endpoint(Some(remote))),
            Some(Towards::From(address, port)) => write!(title, "  port {port} from {address}"),
            None => Ok(()),
        };
        let plural = if total == 1 { "" } else { "s" };
        let _ = write!(title, "  {total} socket{plural}");
        if let Some(netns) = self.netns {
            let _ = write!(title, "  netns {netns}");
        }
        if let Some(container) = self.process.as_ref().and_then(|process| process.container.as_deref()) {
            let _ = write!(title, "  container {}", cut(&escape(container), 12));
        }
        let header = page.palette.header;
        writeln!(page.writer, "{header}{title}{header:#}")?;
        for lingering in &self.shown {
            page.socket(lingering, self.pid())?;
        }
        let more = total - self.shown.len() as u64;
        if more > 0 {
            let mut kinds = Wrapped::new(format!("  and {more} more, in all: "));
            for ((state, kind), count) in &self.kinds {
                kinds.add(&format!("{count} {state} {kind}"));
            }
            page.dim(&kinds.text)?;
        }
        Ok(())
    }
}

struct ReportPage<W: Write> {
    writer: BufWriter<W>,
    palette: Palette,
}

impl<W: Write> ReportPage<W> {
    fn line(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.writer, "{text}")
    }

    fn header(&mut self, text: &str) -> io::Result<()> {
        let Palette { header, .. } = self.palette;
        writeln!(self.writer, "{header}{}{header:#}", text.trim_end())
    }

    fn dim(&mut self, text: &str) -> io::Result<()> {
        let Palette { dim, .. } = self.palette;
        writeln!(self.writer, "{dim}{text}{dim:#}")
    }

    fn socket(&mut self, lingering: &Lingering, owner: Option<u32>) -> io::Result<()> {
        // The kinds that the application itself causes stand out from those that its peer causes.
        let style = match lingering.kind {
            LingeringKind::Leaked | LingeringKind::Unread | LingeringKind::Unaccepted => self.palette.alarm,
            _ => self.palette.peer,
        };
        let age = bounds(lingering.for_ms, lingering.for_ms_at_most);
        // The bytes that wait to be sent or read.
        let waiting = match lingering.kind {
            LingeringKind::PeerNotReading => lingering.unsent_bytes,
            _ => lingering.unread_bytes,
        };
        let waiting = or_dash(waiting.map(|bytes| format!("{bytes}B")));
        let local = endpoint(lingering.connection.local);
        let (state, kind) = (lingering.state, lingering.kind);
        let line = format!("  {age:<13} {state:<10} {style}{kind:<16}{style:#} {waiting:>9}  {local:<21}  ");
        let unstyled = format!("  {age:<13} {state:<10} {kind:<16} {waiting:>9}  {local:<21}  ");
        let room = COLUMNS.saturating_sub(width(&unstyled));
        let holders = holders(lingering.holders.as_deref(), owner);
        writeln!(self.writer, "{}", format!("{line}{}", cut(&holders, room)).trim_end())
    }

    /// Counts every socket once: for its owner or, without one, for its network namespace.
    fn states(&mut self, scan: &Scan) -> io::Result<()> {
        let unowned = || scan.namespaces.iter().filter(|namespace| namespace.states.total() > 0);
        if scan.processes.is_empty() && unowned().next().is_none() {
            return Ok(());
        }
        self.line("")?;
        self.header(&format!("{:>7} {:<15}  SOCKETS IN EACH STATE", "PID", "COMM"))?;
        for tally in scan.processes.iter().take(MAX_PROCESSES) {
            let comm = escape(&tally.process.comm);
            self.counts(format!("{:>7} {:<15}  ", tally.process.pid, cut(&comm, 15)), &tally.states)?;
        }
        let more = scan.processes.len().saturating_sub(MAX_PROCESSES);
        if more > 0 {
            self.dim(&format!("        and {more} more processes"))?;
        }
        for namespace in unowned() {
            let place = format!("netns {}", namespace.netns);
            self.counts(format!("{:>7} {place:<16} ", "none"), &namespace.states)?;
        }
        Ok(())
    }

    fn counts(&mut self, start: String, counts: &Counts) -> io::Result<()> {
        let mut line = Wrapped::new(start);
        for (state, count) in counts.iter() {
            line.add(&format!("{state} {count}"));
        }
        self.line(&line.text)
    }

    fn time_wait(&mut self, namespaces: &[Unowned]) -> io::Result<()> {
        let total: u64 = namespaces.iter().map(|namespace| namespace.time_wait.total).sum();
        if total == 0 {
            return Ok(());
        }
        let mut outgoing: Vec<_> = namespaces.iter().flat_map(in_namespace).collect();
        outgoing.sort_by_key(|(_, outgoing)| std::cmp::Reverse(outgoing.sockets));
        self.line("")?;
        self.header(&format!("{:>9} {:>7}  {:<21} {:<21} NETNS", "TIME_WAIT", "PORTS", "FROM", "TO"))?;
        for (namespace, one) in outgoing.iter().take(MAX_DESTINATIONS) {
            let used = share(namespace, one);
            let style = if used.is_some_and(|used| used >= SCARCE) {
                self.palette.alarm
            } else {
                anstyle::Style::new()
            };
            let used = or_dash(used.map(|used| format!("{used:.1}%")));
            let (from, to) = (one.from.to_string(), endpoint(Some(one.to)));
            let line = format!("{:>9} {used:>7}  {from:<21} {to:<21} {}", one.sockets, namespace.netns);
            writeln!(self.writer, "{style}{line}{style:#}")?;
        }
        let mut shown: u64 =
            outgoing.iter().take(MAX_DESTINATIONS).map(|(_, outgoing)| u64::from(outgoing.sockets)).sum();
        for namespace in namespaces {
            for (port, sockets) in namespace.time_wait.incoming().into_iter().take(MAX_DESTINATIONS) {
                shown += u64::from(sockets);
                let port = format!("port {port}, accepted");
                let line = format!("{sockets:>9} {:>7}  {port:<43} {}", "-", namespace.netns);
                self.line(&line)?;
            }
        }
        if total > shown {
            self.dim(&format!("{:>9} {:>7}  elsewhere", total - shown, "-"))?;
        }
        match outgoing.first() {
            Some((namespace, most)) => self.hint(namespace, most),
            None => self.dim(
                "This host closed first. For a minute, a socket that it had accepted takes some memory, but \
                 no port.",
            ),
        }
    }

    fn hint(&mut self, namespace: &Unowned, most: &Outgoing) -> io::Result<()> {
        let Some((first, last)) = namespace.ports else {
            return self
                .dim("The range of ports from which connect() chooses is not known in that namespace.");
        };
        self.dim(&format!(
            "PORTS: the share of the {} ports that connect() chooses from ({first} to {last}) that is \
             unusable\n\
             for another connection to the same address and port, each for a minute.",
            u32::from(last - first) + 1
        ))?;
        if share(namespace, most).is_some_and(|used| used >= SCARCE) {
            self.line(&format!(
                "Near 100%, connect() to {} fails with EADDRNOTAVAIL. Keep connections open (a pool,\n\
                 keep-alive), or let the other end close first; net.ipv4.tcp_tw_reuse=1 frees ports earlier.",
                endpoint(Some(most.to))
            ))?;
        }
        Ok(())
    }
}

fn in_namespace(namespace: &Unowned) -> impl Iterator<Item = (&Unowned, Outgoing)> {
    // No more destinations than these can be shown.
    namespace
        .time_wait
        .outgoing()
        .into_iter()
        .take(MAX_DESTINATIONS)
        .map(move |outgoing| (namespace, outgoing))
}

/// The percentage of the ports from which `connect()` chooses that is in use towards a destination.
fn share(namespace: &Unowned, outgoing: &Outgoing) -> Option<f64> {
    let (first, last) = namespace.ports?;
    Some(f64::from(outgoing.sockets) * 100.0 / (f64::from(last) - f64::from(first) + 1.0))
}

/// The descriptors of the owner, and `pid/descriptor` of the other holders.
fn holders(holders: Option<&[Holder]>, owner: Option<u32>) -> String {
    let Some(holders) = holders else { return "-".to_owned() };
    let (own, others): (Vec<_>, Vec<_>) = holders.iter().partition(|holder| holder.pid == owner);
    let own = own.iter().map(|holder| holder.fd.to_string());
    let others = others.iter().map(|holder| format!("{}/{}", shown_pid(holder.pid), holder.fd));
    own.chain(others).collect::<Vec<_>>().join(", ")
}

/// Items separated by commas and wrapped, with continuation lines indented to the first item.
struct Wrapped {
    text: String,
    indent: usize,
    column: usize,
}

impl Wrapped {
    fn new(start: String) -> Self {
        let indent = width(&start);
        Self { text: start, indent, column: indent }
    }

    fn add(&mut self, item: &str) {
        if self.column > self.indent {
            self.text.push(',');
            self.column += 1;
            if self.column + 1 + width(item) >= COLUMNS {
                let _ = write!(self.text, "\n{:indent$}", "", indent = self.indent);
                self.column = self.indent;
            } else {
                self.text.push(' ');
                self.column += 1;
            }
        }
        self.text.push_str(item);
        self.column += width(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Event, Role, examples},
        kernel::clock::Clock,
        sockets::Gaps,
    };

    fn nothing() -> Scan {
        Scan {
            at: Clock::now(),
            stuck: Vec::new(),
            processes: Vec::new(),
            namespaces: Vec::new(),
            gaps: Gaps::default(),
        }
    }

    fn written(report: ListReport, palette: Palette) -> String {
        let mut bytes = Vec::new();
        report.write(&mut bytes, palette, &nothing()).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn lingering(pid: u32, role: Option<Role>, remote_port: u16) -> Lingering {
        let Event::Lingering(mut lingering) = examples::lingering() else { unreachable!() };
        lingering.process.as_mut().unwrap().pid = Some(pid);
        lingering.connection.role = role;
        lingering.connection.remote.as_mut().unwrap().port = remote_port;
        *lingering
    }

    #[test]
    fn grouped_by_process_and_remote() {
        let mut report = ListReport::default();
        for (pid, role, remote_port) in [
            (1, Some(Role::Client), 443),
            (2, Some(Role::Client), 443),
            // A group of the same process with another remote end follows the process's first group.
            (1, Some(Role::Client), 444),
            // From one address and two ports.
            (3, Some(Role::Server), 50_000),
            (3, Some(Role::Server), 50_001),
        ] {
            report.add(lingering(pid, role, remote_port));
        }
        let text = written(report, Palette::PLAIN);
        let titles: Vec<_> = text.lines().skip(1).filter(|line| !line.starts_with(' ')).collect();
        assert_eq!(
            titles,
            [
                "1 java  to 10.0.0.2:443  1 socket  netns 4026531840",
                "1 java  to 10.0.0.2:444  1 socket  netns 4026531840",
                "2 java  to 10.0.0.2:443  1 socket  netns 4026531840",
                "3 java  port 443 from 10.0.0.2  2 sockets  netns 4026531840",
            ],
            "{text}"
        );
    }

    #[test]
    fn bounded_and_as_wide_as_a_terminal() {
        let mut report = ListReport::default();
        for number in 0..15 {
            report.add(lingering(1, Some(Role::Server), 50_000 + number));
        }
        for number in 0..150 {
            report.add(lingering(2, None, number));
        }
        let text = written(report, Palette::PLAIN);
        assert!(text.contains("  and 5 more, in all: 15 CLOSE_WAIT leaked"), "{text}");
        assert!(text.contains("and 51 more in other groups"), "{text}");
        assert!(text.lines().all(|line| width(line) <= COLUMNS), "{text}");
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn names_cannot_control_the_terminal() {
        let mut evil = lingering(1, None, 1);
        evil.process.as_mut().unwrap().comm = "\x1b[2J\nfake".into();
        evil.process.as_mut().unwrap().container = Some("\x1b[2J".into());
        let mut report = ListReport::default();
        report.add(evil);
        let text = written(report, Palette::PLAIN);
        assert!(!text.contains('\x1b') && !text.lines().any(|line| line.starts_with("fake")), "{text}");
    }

    #[test]
    fn long_lines_wrap() {
        let mut line = Wrapped::new("   start ".into());
        for _ in 0..30 {
            line.add("ESTABLISHED 12345");
        }
        let lines: Vec<_> = line.text.lines().collect();
        assert!(lines.len() > 1 && lines.iter().all(|line| width(line) <= COLUMNS), "{lines:?}");
        assert!(lines[1..].iter().all(|line| line.starts_with("         ESTABLISHED")), "{lines:?}");
    }
}
