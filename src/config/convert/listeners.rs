//! `listeners`.

use std::collections::HashMap;
use std::sync::Arc;

use super::Converter;
use crate::config::load::suggestion;
use crate::config::raw::Text;
use crate::config::reader::Located;
use crate::config::tree::Place;
use crate::config::{Bind, Destination, Listener, ListenerKind, SocketAccess, raw, text};

impl Converter<'_> {
    pub(super) fn listeners(
        &mut self,
        written: Vec<Located<raw::Listener>>,
        destinations: &[Arc<Destination>],
        binds: &mut HashMap<Bind, Place>,
    ) -> Vec<Listener> {
        let mut names = HashMap::new();
        let mut listeners = Vec::new();
        for Located {
            value: listener,
            place,
        } in written
        {
            let name = self.unique_name("listener", &listener.name, text::name, &mut names);
            let bind = self.parse(&listener.bind, text::bind);
            if let Some(bind) = &bind {
                self.unique_bind(bind, listener.bind.place, binds);
                if let Bind::Tcp(address) = bind
                    && !address.ip().is_loopback()
                {
                    self.warning(
                        "listener_beyond_loopback",
                        listener.bind.place,
                        format!("`{address}` is open to other machines, whose callers leave no kernel evidence"),
                        "bind a loopback address or a Unix socket",
                    );
                }
                if matches!(bind, Bind::Tcp(_)) {
                    self.not_applicable(
                        "access",
                        listener.access.as_ref(),
                        "a TCP address has no permissions",
                    );
                }
            }
            let access = self.access(listener.access);
            let kind = self.listener_kind(
                listener.kind,
                listener.destination.as_ref(),
                place,
                destinations,
            );
            if let (Some(name), Some(bind), Some(kind)) = (name, bind, kind) {
                listeners.push(Listener {
                    name,
                    kind,
                    bind,
                    access,
                });
            }
        }
        listeners
    }

    pub(super) fn unique_bind(
        &mut self,
        bind: &Bind,
        place: Place,
        binds: &mut HashMap<Bind, Place>,
    ) {
        if matches!(bind, Bind::Tcp(address) if address.port() == 0) {
            return;
        }
        if let Some(first) = binds.insert(bind.clone(), place) {
            let first = self.describe(first);
            self.error(
                "duplicate_bind",
                place,
                "this address is bound twice",
                format!("the first is at {first}: choose another address"),
            );
        }
    }

    pub(super) fn access(&mut self, written: Option<Located<raw::Access>>) -> SocketAccess {
        let (mode, group) = written.map_or((None, None), |Located { value, .. }| {
            (value.mode, value.group)
        });
        SocketAccess {
            mode: self.parse_option(mode.as_ref(), text::mode),
            group: self.parse_option(group.as_ref(), text::plain),
        }
    }

    pub(super) fn listener_kind(
        &mut self,
        kind: Located<raw::ListenerType>,
        destination: Option<&Text>,
        whole: Place,
        destinations: &[Arc<Destination>],
    ) -> Option<ListenerKind> {
        if kind.value != raw::ListenerType::Gateway {
            self.not_applicable("destination", destination, "it belongs to a `gateway`");
        }
        match kind.value {
            raw::ListenerType::ForwardProxy => Some(ListenerKind::ForwardProxy),
            raw::ListenerType::WorkloadApi => Some(ListenerKind::WorkloadApi),
            raw::ListenerType::Gateway => {
                let Some(name) = destination else {
                    self.missing("destination", whole, kind.place, "a `gateway` serves one");
                    return None;
                };
                let found = destinations
                    .iter()
                    .find(|destination| *destination.name == name.value);
                if found.is_none() && self.is_unknown(&name.value, &self.destination_names) {
                    let next = suggestion(
                        &name.value,
                        self.destination_names.iter().map(String::as_str),
                    );
                    self.error(
                        "unknown_destination",
                        name.place,
                        format!("no destination is named `{}`", name.value),
                        next,
                    );
                }
                found.map(|destination| ListenerKind::Gateway {
                    destination: Arc::clone(destination),
                })
            }
        }
    }
}
