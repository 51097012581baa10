//! One file per hook: a program for each way to attach it, and the code that these programs share.

mod accept;
mod destroy_sock;
mod fork;
mod inspect;
mod inventory;
mod netif_receive_skb;
mod receive_reset;
mod send_reset;
mod set_state;
mod signal_generate;
mod ttl;
