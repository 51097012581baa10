//! One file a hook: the two ways to attach it, and what it does, written once for both.

mod accept;
mod destroy_sock;
mod fork;
mod inspect;
mod inventory;
mod netif_receive_skb;
mod receive_reset;
mod send_reset;
mod set_state;
mod ttl;
