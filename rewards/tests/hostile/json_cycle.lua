-- may end in: runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local t = {} t.t = t return rft.json.encode(t) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
