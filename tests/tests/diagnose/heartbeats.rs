//! A broker and clients that send each other heartbeats, which are no requests and no answers.

use std::thread;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tcpclose_tests::{
    program::Program,
    servers::{EPMD, PYTHON, RABBITMQ, is_missing, start_rabbitmq, start_script},
};

use super::{SEVERAL, Site, healthy, none, only};

const BROKER: u16 = 5672;

/// In seconds. The broker sends a heartbeat twice in this time, and ends connections on which it has received
/// nothing for twice this time.
const HEARTBEAT: &str = "2";

fn clients(site: &Site) -> Result<Program> {
    let args = [&BROKER.to_string(), HEARTBEAT, "0.7", &(2 * SEVERAL).to_string()];
    start_script(&site.namespace, "amqp_client.py", &args)
}

/// The broker is killed while no client waits for anything. On about half of the connections, the last data
/// is a heartbeat of the client.
#[test]
fn a_broker_is_killed() -> Result<()> {
    if is_missing(&[PYTHON, EPMD, RABBITMQ]) {
        return Ok(());
    }
    let site = Site::open()?;
    let [mut broker, _names] = start_rabbitmq(&site.namespace, site.folder.path(), BROKER)?;
    let mut clients = clients(&site)?;
    broker.signal(Signal::SIGKILL)?;
    let pid = broker.pid();
    broker.ended()?;
    ensure!(clients.ask("end")? == "done");
    let finding = only(&site.diagnose(BROKER, 4 * SEVERAL)?, "deploy")?;
    ensure!(finding["process"]["pid"] == pid && finding["process"]["comm"] == "beam.smp", "{finding:#}");
    ensure!(finding["count"] == 2 * SEVERAL && finding["evidence"]["requests_lost"] == 0, "{finding:#}");
    Ok(())
}

/// Clients that send heartbeats for a while and close in order; and others that stop, so that the broker ends
/// their connections. It has sent heartbeats itself until then: they were not idle.
#[test]
fn heartbeats_that_fail_to_come() -> Result<()> {
    if is_missing(&[PYTHON, EPMD, RABBITMQ]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _broker = start_rabbitmq(&site.namespace, site.folder.path(), BROKER)?;
    let (mut orderly, mut hushed) = (clients(&site)?, clients(&site)?);
    thread::sleep(healthy::duration()?);
    ensure!(orderly.ask("close")? == "done");
    ensure!(hushed.ask("hush")? == "done");
    none(&site.diagnose(BROKER, 8 * SEVERAL)?)
}
