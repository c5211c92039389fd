-- may end in: ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return rft.json.decode(string.rep("[", 1e5)) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
